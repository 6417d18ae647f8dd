"""What a checkpoint's file says about how it wants to be rolled out.

The host's loaders do not pass a file's metadata on, so it is found again by the weights' fingerprint.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open

from .model import fingerprint

METADATA_KEY = "adastate"


def rollout_defaults(patcher: Any) -> dict[str, Any] | None:
    """The rollout settings in the metadata of the file that `patcher` was loaded from, or None.

    Keys: steps, shift, chunk_frames, window_frames, positions, state_frames, state_after_past (each optional), and
    fingerprints: one for each dtype that the host may load the file in.
    """
    wanted = fingerprint(patcher)
    for name in folder_paths.get_filename_list("diffusion_models"):
        path = folder_paths.get_full_path("diffusion_models", name)
        if path is None or not name.endswith((".safetensors", ".sft")):
            continue
        settings = _settings(path, Path(path).stat().st_mtime_ns)
        if settings is not None and wanted in settings.get("fingerprints", ()):
            return settings
    return None


@lru_cache(maxsize=512)
def _settings(path: str, changed: int) -> dict[str, Any] | None:
    """The metadata of one file (its header only is read); `changed` keys the cache."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        settings = json.loads(text) if text else None
    except (SafetensorError, OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None
