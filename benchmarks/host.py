"""The host and the pack for a benchmark, loaded as the host loads a pack, and models of a chosen geometry."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACK = Path(__file__).resolve().parents[1]
RESULTS = PACK / "benchmarks" / "results"
# width, feed-forward width, layers
GEOMETRIES = {"demo": (256, 1024, 6), "1.3b": (1536, 8960, 30), "14b": (5120, 13824, 40)}


def load_pack() -> None:
    """Put the host on the path and the pack into sys.modules as `adastate_pack`; the repository stays off the path."""
    path = os.environ.get("COMFYUI_PATH", "")
    if not Path(path, "comfy").is_dir():
        raise SystemExit("benchmarks need the host: run them as `python3 run.py bench NAME`, or set COMFYUI_PATH.")
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(
        "adastate_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["adastate_pack"] = module
    spec.loader.exec_module(module)


def random_weights(geometry: str, layers: int | None = None, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random weights of a Wan 2.1 geometry, always the same of one `device` that draws them; bf16 on a GPU, else float32."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    width, feed_forward, depth = GEOMETRIES[geometry]
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with torch.device("meta"):
        shapes = WanModel(
            model_type="t2v", dim=width, ffn_dim=feed_forward, num_heads=width // 128, num_layers=layers or depth,
            in_dim=16, out_dim=16, operations=comfy.ops.disable_weight_init, device="meta", dtype=dtype,
        ).state_dict()  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, value in shapes.items():
        if "norm" in name and name.endswith("weight"):
            state[name] = torch.ones(value.shape, dtype=dtype)
        else:
            fan = value[0].numel() if value.ndim > 1 else 400
            state[name] = (torch.randn(value.shape, generator=generator, device=device) / fan**0.5).to("cpu", dtype)
    return state


def random_model(geometry: str, layers: int | None = None, fp8: bool = False, device: str = "cpu") -> Any:
    """A MODEL of a Wan 2.1 geometry with random weights, through the host's own loader (`fp8`: 8-bit linear weights, as
    Load Diffusion Model's weight_dtype gives them)."""
    import comfy.sd

    weights = random_weights(geometry, layers, device)
    return comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float8_e4m3fn} if fp8 else {})


def add_geometry(parser: argparse.ArgumentParser) -> None:
    """The options that choose a random model and its picture."""
    parser.add_argument("--model", choices=sorted(GEOMETRIES), default="demo")
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)


def demo_vae() -> Any:
    """The shipped VAE through the host's own loader."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(PACK / "models" / "vae" / "adastate_demo_vae.safetensors")))


def device_name() -> str:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def synchronise() -> None:
    """Wait for the device, so that a clock means something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interval(ordered: list[float]) -> tuple[float, float]:
    """Between which two of these the median of all such values lies in at least 95 of 100 cases (as in a sign test)."""
    count, outside, cut = len(ordered), 0.0, 0
    while cut < (count - 1) // 2 and outside + math.comb(count, cut) / 2**count <= 0.025:
        outside += math.comb(count, cut) / 2**count
        cut += 1
    cut = max(cut - 1, 0)
    return ordered[cut], ordered[-1 - cut]


def table_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def write_table(
    name: str, title: str, header: list[str], rows: list[list[str]], notes: list[str], more: Sequence[str] = ()
) -> None:
    """Print a Markdown table, the notes and further lines (`more`) and keep them under benchmarks/results/."""
    lines = [f"# {title}", "", f"Device: {device_name()}; torch {torch.__version__.split('+')[0]}.", ""]
    lines += [*table_lines(header, rows), "", *[f"- {note}" for note in notes], "", *more]
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
