"""What runs here, for a bug report: versions, the card, how the host uses it. No path and no name of anybody."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import comfy.ldm.wan.model
import comfy.model_management
import torch

from .output_files import PACK

PACKAGES = ("safetensors", "av", "kornia", "numpy", "comfyui-frontend-package")


def pack_version() -> str:
    """As pyproject.toml says."""
    found = re.search(r'(?m)^version = "([\w.]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def host_version() -> str:
    """ComfyUI's own."""
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return __version__


def _package(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def device_line() -> str:
    """The host's device: its name and memory, or the processor and its threads."""
    device, gib = comfy.model_management.get_torch_device(), 2**30
    memory = comfy.model_management.get_total_memory(device) / gib
    if device.type == "cpu":
        return f"no GPU: {_processor()}, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    if device.type != "cuda":
        return f"{device.type}, {memory:.1f} GiB"
    major, minor = torch.cuda.get_device_capability(device)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{torch.cuda.get_device_name(device)}, {memory:.1f} GiB, compute {major}.{minor}, {runtime}"


def version_lines() -> list[str]:
    """A few lines for the head of a table."""
    attention = getattr(comfy.ldm.wan.model.optimized_attention, "__name__", "unknown")
    return [
        f"pack {pack_version()}, ComfyUI {host_version()}, torch {torch.__version__}, Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}",
        f"device: {device_line()}",
        f"attention: {attention}; memory: {comfy.model_management.vram_state.name}; {', '.join(map(_package, PACKAGES))}",
    ]
