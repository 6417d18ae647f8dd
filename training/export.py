"""Stage 4: what the host's standard loaders take, as bf16 safetensors in models/.

    python -m training.export --config training/configs/export.toml

The transformer's file carries how it wants to be rolled out (metadata key "adastate", JSON) with the
fingerprints by which the rollout node recognises its weights once the host's loader has dropped the metadata.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from adastate_core.files.whole_file import whole_file

from .run import Run, log

# what the host's loader may turn a file's weights into
LOADED_AS = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def fingerprint(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """The fingerprint of nodes/host/model.py for weights loaded as `dtype` (tests/host/test_model.py compares)."""
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    names = ["head.modulation"]
    for i in sorted({0, (layers - 1) // 2, layers - 1}):
        names += [f"blocks.{i}.modulation", f"blocks.{i}.self_attn.norm_k.weight", f"blocks.{i}.norm3.weight"]
    digest = hashlib.sha256()
    for name in names:
        values = weights[name].flatten()[:256].to(dtype).float().to(torch.bfloat16).view(torch.int16)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_weights(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not there, that everybody may read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        file.write(save(tensors, metadata=metadata))
    target.chmod(0o644)
    log.info("%s: %.2f MB", target, target.stat().st_size / 1e6)


def main() -> None:
    run = Run.from_arguments("Export the trained pair.")
    for kind in ("vae", "diffusion_models"):
        entry = run.config.get(kind)
        if entry is None:
            continue
        weights = torch.load(entry["weights"], weights_only=True)
        halves = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
        metadata = {"format": "pt"}
        if kind == "diffusion_models":
            metadata["adastate"] = json.dumps(
                entry["rollout"] | {"fingerprints": [fingerprint(halves, dtype) for dtype in LOADED_AS]}
            )
        target = Path(run.config["folder"]) / kind / entry["file"]
        write_weights(target, halves, metadata)


if __name__ == "__main__":
    main()
