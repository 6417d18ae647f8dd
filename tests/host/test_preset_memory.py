"""What README and docs/memory.md say that presets take, against the node that plans and against sums by hand."""

from __future__ import annotations

import json
import re

import comfyui_version
import pytest
from conftest import PACK, HostNode
from real_geometry import MODELS, on_any_card

GIB = 2**30
README = (PACK / "README.md").read_text(encoding="utf-8")
MEMORY = (PACK / "docs" / "memory.md").read_text(encoding="utf-8")
# the host's estimates are one version's
SAME_HOST = f"those of ComfyUI {comfyui_version.__version__}." in README
# latent frames whose keys and values a layer has: anchor, window, state and chunk, by the systems' own words
FRAMES = {
    "self_forcing": 21, "longlive": 3 + 6 + 3, "longlive2_5b": 8 + 16 + 8, "krea_14b": 3 + 3,
    "liveavatar": 4 * (9 + 3) + 2.5,  # of four levels; the reference and the frames before the video
    "adastate": 1 + 3 + 1 + 3,
}  # fmt: skip
SIZES = {"longlive2_5b": ("832x480", "1280x704"), "liveavatar": ("704x384", "832x480")}


def rows(text: str, name: str) -> list[list[str]]:
    table = text.partition(f"<!-- preset_memory: {name} -->")[2].partition("<!-- preset_memory ends -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]


def says(cell: str, size: float) -> bool:
    """Whether a cell is a size in GiB, rounded to the digits that it has."""
    digits = len(cell.partition(".")[2])
    return digits >= 1 and abs(float(cell) - size / GIB) <= 0.51 * 10**-digits


def parameters(model: str) -> int:
    """Of a Wan transformer, counted by hand."""
    width, feed_forward, layers = MODELS[model]
    attention = 4 * (width * width + width) + 2 * width  # q, k, v, o and the norms of q and k
    ffn = 2 * width * feed_forward + width + feed_forward
    block = 2 * attention + ffn + 2 * width + 6 * width  # the norm before the text's attention; the modulation
    text, time = 4096 * width + width + width * width + width, 256 * width + width + width * width + width
    channels = 48 if model == "5B" else 16
    ends = channels * 4 * width + width + channels * 4 * width + channels * 4 + 2 * width
    whole = layers * block + text + time + width * 6 * width + 6 * width + ends
    return whole + hearing(width) if model.startswith("S2V") else whole


def hearing(width: int) -> int:
    """What an S2V model has beyond text to video."""
    square = width * width + width
    injectors = 12 * (4 * square + 2 * width + 2 * square)  # q, k, v, o, two norms; shift and scale
    # windows of 3: four heads and the whole out of 1024 features, both then through the same kind of two more
    quarter, half = width // 4, width // 2
    towers = (
        3 * 1024 * width + width + 3 * 1024 * quarter + quarter + 3 * quarter * half + half + 3 * half * width + width
    )
    encoder = 25 + width + towers + square  # the layers' weights, the padding token, the last linear
    packed = sum(16 * volume * width + width for volume in (4, 2 * 16, 4 * 64))  # 1, 2 and 4 latent frames a token
    marks, pose = 3 * width, 16 * 4 * width + width
    return injectors + encoder + packed + marks + pose


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(PACK / "benchmarks"))
    import preset_memory

    return preset_memory


def test_the_tables_are_the_plans(command):
    found = rows(README, "first")
    assert [(row[0], row[2]) for row in found] == [
        (p, s) for p in FRAMES for s in SIZES.get(p, ("832x480", "1280x720"))
    ]
    with on_any_card() as device:
        card = command.Card(device)
        for preset, shown, size, *cells in found:
            model, (width, height) = shown.removeprefix("Wan 2.1 ").removeprefix("Wan 2.2 "), map(int, size.split("x"))
            space = "Wan 2.2" if model == "5B" else "Wan 2.1"
            vaes, pixels = card.vaes[space], 32 if model == "5B" else 16
            weights, cache, _, vae, whole, small = cells
            given = HostNode("AdaStateModelPreset")(model=card.models[model], preset=preset).args[0]
            inputs = dict(model=given, width=width, height=height, length=961)
            plans = {
                name: json.loads(HostNode("AdaStatePlan")(**inputs, vae=one).args[1])["memory"]["device"]
                for name, one in vaes.items()
            }
            size_by_hand, _, layers = MODELS[model]
            tokens = (width // pixels) * (height // pixels)
            frames = FRAMES[preset] * tokens + 512  # and the prompt's tokens
            assert says(weights, 2 * parameters(model)), (preset, weights)
            assert says(cache, 2 * 2 * layers * frames * size_by_hand), (preset, size, cache)
            if SAME_HOST:
                sums = {name: sum(plan.values()) + vaes[name].patcher.model_size() for name, plan in plans.items()}
                assert says(whole, 2 * parameters(model) + sums["full"]), (preset, size, whole)
                assert says(small, parameters(model) + sums["tiny"]), (preset, size, small)
                assert says(
                    vae,
                    sums["full"] - sum(plans["full"].values()) + plans["full"]["vae_cache"] + plans["full"]["decoder"],
                )
        made = {
            name: [[cell.strip("*") for cell in row] for row in each(card)]
            for name, (_, each) in command.TABLES.items()
        }
    for file, names in command.FILES.items():
        for name in names if SAME_HOST else ():
            assert rows((PACK / file).read_text(encoding="utf-8"), name) == made[name], (
                f"run bench preset_memory: {name}"
            )


def test_a_table_has_one_place(command):
    text = "a\n<!-- preset_memory: first -->\nold\n<!-- preset_memory ends -->\nb"
    once = command.filled(text, "first", "| new |")
    assert re.findall(r"old|new", once) == ["new"] and command.filled(once, "first", "| new |") == once
    for wrong in ("no place", text + text):
        with pytest.raises(SystemExit, match="there must be one"):
            command.filled(wrong, "first", "")
