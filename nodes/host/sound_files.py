"""Files with sound in the host's input folder."""

from __future__ import annotations

import os

import folder_paths


def sound_files() -> list[str]:
    """Names of music and videos that lie in the input folder itself, as the host's own loader lists them."""
    root = folder_paths.get_input_directory()
    names = [entry.name for entry in os.scandir(root) if entry.is_file()] if os.path.isdir(root) else []
    return sorted(folder_paths.filter_files_content_types(names, ["audio", "video"]))
