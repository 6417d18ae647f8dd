"""The plan is the truth: what is counted live on CUDA's stand-in, at real models' shapes, is what was planned.

Two layers here; all layers: python3 run.py bench planned_memory (benchmarks/results/planned-memory.md). What a layer adds is
counted apart, so that the two say the same.
"""

from __future__ import annotations

import pytest
import torch
from planned_bytes import MODELS, TEXT, cases_of, counted, spec_of

from adastate_core.cache.working_bytes import latent_bytes, working_bytes

# longer than the suite has time for
LONG = {"absorption 120", "longlive 2, fp8"}
# of two layers, what all layers share is the larger part, and not every case makes a pass over less than a chunk
FEW_LAYERS = 1.3


COUNTED = [(case, model) for model in ("1.3B", "5B", "S2V") for case in cases_of(model) if case not in LONG] + [
    ("adaptive", "14B")
]


@pytest.mark.parametrize(("case", "model"), COUNTED)
@pytest.mark.sampled(2)
def test_what_is_counted_is_what_was_planned(case, model):
    found = counted(case, model, layers=2)
    assert found.peak["cuda"] <= found.total <= FEW_LAYERS * found.peak["cuda"], (found.planned, found.peak)


def test_page_locked_memory_is_counted_as_torch_rounds_it():
    """Layers in host memory, a snapshot's staging buffers, the noise: of several layers, as what they share is rounded, too."""
    found = counted("host memory", "1.3B", layers=4)
    assert found.peak["pinned"] <= found.locked <= 1.1 * found.peak["pinned"], (found.locked, found.peak)
    assert found.locked > 1.1 * sum(size for name, size in found.planned.items() if name.startswith("host_"))


@pytest.mark.parametrize("model", MODELS)
def test_each_further_layer_adds_what_its_cache_and_its_text_take(model):
    two, three = (counted("adaptive", model, layers=n) for n in (2, 3))
    plans = [spec_of("adaptive", model, n).plan(TEXT, length=15).bytes() for n in (2, 3)]
    more = sum(plans[1].values()) - sum(plans[0].values())
    assert three.peak["cuda"] - two.peak["cuda"] == more == three.total - two.total


def test_a_frame_of_the_5b_line_takes_what_its_geometry_says():
    """880 tokens, 3072 wide, 30 layers, keys and values in bf16: 309.4 MiB a latent frame of 1280x704, 24 of them as past."""
    frame = 880 * 3072 * 30 * 2 * 2
    plan = spec_of("longlive 2", "5B").plan(TEXT)
    assert plan.tokens == 880 and 30 * 2 * plan.frame_bytes == frame and round(frame / 2**20, 1) == 309.4
    assert plan.bytes()["k"] + plan.bytes()["v"] == 24 * frame


def test_a_frame_of_liveavatar_takes_what_its_geometry_says():
    """1056 tokens, 5120 wide, 40 layers, keys and values in bf16: 825 MiB a latent frame of 704x384. The published code keeps
    12 frames for each of its 4 steps, 38.7 GiB; 3 of each are the chunk's own, which are never held here. The picture takes 2.5.
    """
    plans = {
        name: spec_of(name, "S2V").plan(TEXT) for name in ("liveavatar", "liveavatar, one window", "liveavatar, int8")
    }
    frame = 1056 * 5120 * 40 * 2 * 2
    assert frame == 825 * 2**20 and round(4 * 12 * frame / 2**30, 1) == 38.7
    held = {name: plan.bytes()["k"] + plan.bytes()["v"] for name, plan in plans.items()}
    assert held == {"liveavatar": 36 * frame, "liveavatar, one window": 9 * frame, "liveavatar, int8": 18 * frame}
    assert {plan.bytes()["reference"] for plan in plans.values()} == {frame * 5 // 2}


def test_the_working_line_is_of_one_operation_whatever_the_window_and_the_layers():
    plans = [spec_of("packed 18", "1.3B", layers).plan(TEXT) for layers in (2, 30)]
    assert plans[0].bytes()["working"] == plans[1].bytes()["working"]
    few, many = (spec_of("none", "14B").plan(TEXT, steps=steps) for steps in (4, 100))
    assert latent_bytes(many) - latent_bytes(few) == 96 * 3 * 16 * 60 * 104 * 4
    plain, collecting = working_bytes(few, False, False), working_bytes(few, True, False)
    # three frames of keys: turned in float32 and rounded, and the block before them on its way: 10 bytes a number
    assert few.frame_bytes * 3 * 5 + latent_bytes(few) == plain < collecting


def test_float32_and_bfloat16_are_counted_by_their_size():
    from dataclasses import replace

    plan = spec_of("none", "1.3B").plan()
    wide = replace(plan, dtype=torch.float32)
    assert wide.bytes()["k"] == 2 * plan.bytes()["k"] and wide.bytes()["rope_tables"] == plan.bytes()["rope_tables"]
