"""What each preset takes of a card: python3 run.py bench preset_memory

Writes the tables of README.md and docs/memory.md, each between its two marks. The figures are those of the node Plan Rollout
Memory, at the exact shapes of Wan 2.1 1.3B and 14B, of its VAE and its text encoder; no weights and no GPU are needed. What the
host estimates is the host's that this is run on, and README names its version.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import host
import torch

if "adastate_pack" not in sys.modules:
    host.load_pack()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "core"), str(ROOT / "tests" / "host")]

import comfy.ops  # noqa: E402
import comfy.text_encoders.t5  # noqa: E402
import comfyui_version  # noqa: E402
from adastate_pack.adastate_core.geometry import WAN21, WAN22, LatentSpace  # noqa: E402
from adastate_pack.adastate_core.weights.presets import PRESETS  # noqa: E402
from adastate_pack.nodes.models import ModelPresetNode, PlanNode  # noqa: E402
from real_geometry import on_any_card, patcher_of, tiny_vae_of, vae_2_2_of, vae_of  # noqa: E402

GIB = 2**30
SIZES = ((832, 480), (1280, 720))
SIZES_5B = ((832, 480), (1280, 704))  # multiples of 32
SIZES_S2V = ((704, 384), (832, 480))  # the first is that of the published command
LENGTH = 961  # a minute; the caches are the same at any length from some seconds on
FIRST = ("self_forcing", "longlive", "longlive2_5b", "krea_14b", "liveavatar", "adastate")
S2V = "S2V 14B"
MODELS = ("1.3B", "5B", "14B", S2V)
# rows of the table of choices: a preset, and inputs of the node that plans
CHOICES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("self_forcing", "1.3B", {}),
    ("self_forcing", "1.3B", {"cache_dtype": "int8"}),
    ("self_forcing", "1.3B", {"cache_device": "host memory"}),
    ("self_forcing", "1.3B", {"cache_dtype": "int8", "cache_device": "host memory"}),
    ("self_forcing", "1.3B", {"window_frames": 9}),
    ("adastate", "1.3B", {}),
    ("adastate", "1.3B", {"window_frames": 18}),
    ("adastate", "1.3B", {"window_frames": 18, "cache_dtype": "int8"}),
    ("adastate", "1.3B", {"window_frames": 60, "cache_dtype": "int8"}),
    ("adastate", "14B", {}),
    ("self_forcing", "14B", {}),
    ("self_forcing", "14B", {"cache_dtype": "int8"}),
    ("self_forcing", "14B", {"cache_dtype": "int8", "cache_device": "host memory"}),
)


def gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def table(header: str, rows: list[list[str]]) -> str:
    """A Markdown table whose first columns are words and all others numbers."""
    names = header.split(" | ")
    words = sum(name in ("preset", "model", "what", "VAE", "size", "inputs") for name in names)
    lines = host.table_lines(names, rows)
    lines[1] = "|" + " --- |" * words + " ---: |" * (len(names) - words)
    return "\n".join(lines)


def model_of(preset: str) -> str:
    if PRESETS[preset].space == WAN22:
        return "5B"
    if PRESETS[preset].driven_by_sound:
        return S2V
    return "14B" if preset.endswith("14b") else "1.3B"


def space_of(model: str) -> LatentSpace:
    return WAN22 if model == "5B" else WAN21


def sizes_of(model: str) -> tuple[tuple[int, int], ...]:
    return {"5B": SIZES_5B, S2V: SIZES_S2V}.get(model, SIZES)


def shown(model: str) -> str:
    return f"Wan 2.2 {model}" if model == S2V else f"{space_of(model).name} {model}"


@dataclass
class Card:
    """Models and VAEs that are shapes alone, and what the node plans for them."""

    device: torch.device
    models: dict[str, Any] = field(default_factory=dict)
    # by the latent space's name, then full and tiny
    vaes: dict[str, dict[str, Any]] = field(default_factory=dict)
    decodings: dict[tuple[str, str, tuple[int, int]], dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = {name: patcher_of(name, self.device) for name in MODELS}
        self.vaes = {
            WAN21.name: {"full": vae_of(self.device), "tiny": tiny_vae_of(self.device)},
            WAN22.name: {"full": vae_2_2_of(self.device), "tiny": tiny_vae_of(self.device, WAN22)},
        }

    def weights(self, model: str) -> int:
        return self.models[model].model_size()

    def in_fp8(self, model: str) -> int:
        """As the host's loader makes them with weight_dtype fp8: a byte each."""
        return sum(weight.numel() for weight in self.models[model].model.diffusion_model.parameters())

    def plan(self, preset: str, model: str, size: tuple[int, int], vae: str = "full", **inputs: Any) -> dict[str, Any]:
        """The node's JSON."""
        given = ModelPresetNode.execute(self.models[model], preset).args[0]
        decoder = self.vaes[space_of(model).name][vae]
        return json.loads(PlanNode.execute(given, *size, LENGTH, vae=decoder, **inputs).args[1])

    def decoding(self, vae: str, size: tuple[int, int], space: LatentSpace = WAN21) -> dict[str, int]:
        """Bytes of a latent space's VAE: its weights, its cache and what a decode takes; none of it depends on the preset."""
        if (space.name, vae, size) not in self.decodings:
            preset, model = ("adastate", "1.3B") if space == WAN21 else ("longlive2_5b", "5B")
            device = self.plan(preset, model, size, vae)["memory"]["device"]
            weights = self.vaes[space.name][vae].patcher.model_size()
            self.decodings[space.name, vae, size] = {
                "weights": weights, "cache": device["vae_cache"], "decode": device["decoder"],
            }  # fmt: skip
        return self.decodings[space.name, vae, size]


def cache_bytes(plan: dict[str, Any]) -> int:
    """Keys and values on the card, those of the prompt and of the reference too."""
    device = plan["memory"]["device"]
    return plan["kv_bytes"] + device["text_kv"] + device.get("reference", 0)


def computing_bytes(plan: dict[str, Any]) -> int:
    device = plan["memory"]["device"]
    return device["rope_tables"] + device["working"] + device["host_forward"]


def first_rows(card: Card) -> Iterator[list[str]]:
    for preset in FIRST:
        for size in sizes_of(model_of(preset)):
            model, plan = model_of(preset), card.plan(preset, model_of(preset), size)
            rollout = cache_bytes(plan) + computing_bytes(plan)
            full, tiny = (sum(card.decoding(vae, size, space_of(model)).values()) for vae in ("full", "tiny"))
            yield [
                preset, shown(model), "x".join(map(str, size)), gib(card.weights(model)), gib(cache_bytes(plan)),
                gib(computing_bytes(plan)), gib(full), f"**{gib(card.weights(model) + rollout + full)}**",
                gib(card.in_fp8(model) + rollout + tiny),
            ]  # fmt: skip


def preset_rows(card: Card) -> Iterator[list[str]]:
    for preset in PRESETS:
        for size in sizes_of(model_of(preset)):
            plan = card.plan(preset, model_of(preset), size)
            memory = plan["memory"]
            yield [
                preset, model_of(preset), "x".join(map(str, size)), gib(cache_bytes(plan)), gib(computing_bytes(plan)),
                gib(memory["host"]["state"]), gib(memory["disk"]["state"]),
            ]  # fmt: skip


def weight_rows(card: Card) -> Iterator[list[str]]:
    for model in MODELS:
        yield [shown(model), gib(card.weights(model)), gib(card.in_fp8(model))]
    config = Path(comfy.text_encoders.t5.__file__).with_name("umt5_config_xxl.json")
    numbers = json.loads(config.read_text())
    encoder = comfy.text_encoders.t5.T5(numbers, torch.float16, "meta", comfy.ops.disable_weight_init)
    count = sum(weight.numel() for weight in encoder.parameters())
    yield ["umt5-xxl, the text encoder", gib(2 * count), gib(count)]
    for space, vaes in card.vaes.items():
        for name, vae in vaes.items():
            yield [f"the {name} VAE of {space}", gib(vae.patcher.model_size()), ""]


def decoding_rows(card: Card) -> Iterator[list[str]]:
    for space, sizes in ((WAN21, SIZES), (WAN22, SIZES_5B)):
        for vae in card.vaes[space.name]:
            for size in sizes:
                taken = card.decoding(vae, size, space)
                yield [f"{vae}, {space.name}", "x".join(map(str, size)), gib(taken["cache"]), gib(taken["decode"])]


def choice_rows(card: Card) -> Iterator[list[str]]:
    for preset, model, inputs in CHOICES:
        plan = card.plan(preset, model, SIZES[0], **inputs)
        words = ", ".join(f"{name} {value}" for name, value in inputs.items()) or "as the preset says"
        held = plan["memory"]["host"]["page_locked"] if plan["host_bytes"] else 0
        yield [preset, model, words, gib(cache_bytes(plan)), gib(computing_bytes(plan)), gib(held) if held else ""]


TABLES: dict[str, tuple[str, Callable[[Card], Iterator[list[str]]]]] = {
    "first": (
        "preset | model | size | weights | KV cache | computing | full VAE | all, in bf16 | all, fp8 weights and tiny VAE",
        first_rows,
    ),
    "weights": ("what | 16 bits | fp8", weight_rows),
    "decoding": ("VAE | size | its cache | a decode", decoding_rows),
    "presets": ("preset | model | size | KV cache | computing | a state in host memory | on disk", preset_rows),
    "choices": ("preset | model | inputs | KV cache | computing | page-locked host memory", choice_rows),
}
FILES = {"README.md": ("first",), "docs/memory.md": ("weights", "decoding", "presets", "choices")}


def filled(text: str, name: str, made: str) -> str:
    """`text` with what stands between the two marks of `name` replaced."""
    begin, end = f"<!-- preset_memory: {name} -->", "<!-- preset_memory ends -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{made}\n{end}", text)
    if count != 1:
        raise SystemExit(f"there are {count} places for the table {name}, and there must be one: {begin} ... {end}")
    return changed


def main() -> int:
    with on_any_card() as device:
        card = Card(device)
        made = {name: table(header, list(rows(card))) for name, (header, rows) in TABLES.items()}
    said = f"The host's estimates in it are those of ComfyUI {comfyui_version.__version__}."
    for file, names in FILES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            text = filled(text, name, f"{made[name]}\n\n{said}" if name == "first" else made[name])
        (ROOT / file).write_text(text, encoding="utf-8")
    for text in made.values():
        sys.stdout.write(text + "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
