"""What a GPU is asked to do, counted without one: operations by part against committed numbers, for blocks that go the plain way
and compiled ones; what is left in a compiled block; and nothing within a pass that makes the CPU wait for the device or copies
between the two."""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import ceil

import comfy.ldm.wan.model
import pytest
import torch
from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorDeep, AnchorEMA, AnchorStatic
from adastate_pack.nodes.host import fusing
from budgets import COMPILED, COMPILED_GELU_APART, PLAIN
from counted_ops import CountedOps, over_budget
from fake_cuda import fake_cuda
from real_geometry import on_fake_cuda, rollout_of, steady_chunk
from torch._subclasses.fake_tensor import DynamicOutputShapeException

ABSORBED = AbsorptionSettings(warmup_frames=6, local_window_frames=3)
# what differs from an adaptive state with 3 frames of window, and how many chunks fill the cache
CASES = {
    "adaptive": ({}, 2),
    "none at 7 frames": ({"anchor": Anchor(), "window": 4}, 2),
    "longlive": ({"anchor": AnchorStatic(3), "window": 6}, 4),
    "self forcing": ({"anchor": Anchor(), "window": 18}, 7),
    "frame-wise": ({"anchor": Anchor(), "window": 8, "chunk": 1}, 9),
    "ema": ({"anchor": AnchorEMA(3), "window": 6}, 4),
    "deep": ({"anchor": AnchorDeep(2, 4, 8), "window": 6}, 8),
    "int8": ({"anchor": AnchorAdaptive(1), "window": 6, "cache_dtype": "int8"}, 4),
    "host memory": ({"anchor": AnchorAdaptive(1), "window": 6, "cache_device": "host memory"}, 4),
    "rolling forcing": ({"anchor": AnchorStatic(3), "window": 18, "blocks": 5, "shares_window": True, "steps": 5}, 8),
    "absorption": ({"anchor": AnchorStatic(1), "window": 12, "absorption": ABSORBED}, 8),
}


LAYERS = 30
WAYS = ("plain", "compiled")
GELU_APART = hasattr(comfy.ldm.wan.model, "WanFeedForward")
BUDGET = {"plain": PLAIN, "compiled": COMPILED_GELU_APART if GELU_APART else COMPILED}
# a host that fuses parts of its own may take fewer
EXACT = not fusing.host_fuses()
FIVE = ("norm_modulate", "norm_rotate", "gate_norm", "add_norm_modulate", "gate")


@cache
def taken(way: str, layers: int) -> CountedOps:
    """The count of a model of so many layers, with the chunk of a full cache as its part "steady"."""
    with on_fake_cuda("1.3B", layers, way) as (host, counted):
        rollout = rollout_of(host, counted)
        assert len(host.fused_blocks.compiled_layers) == (layers if way == "compiled" else 0), host.fused_blocks.why
        part = steady_chunk(host, counted, rollout)
    assert part == "steady"
    assert not counted.crossed("steady/rotation"), "the tables of a full cache are found again, chunk after chunk"
    return counted


def parts(way: str, layers: int) -> dict[str, int]:
    """Operations by part of a chunk."""
    counted = taken(way, layers)
    names = ("step", "step/pass/block", "clean", "rotation", "clean/rotation", "commit")
    of = {name: counted.total(f"steady/{name}") for name in names}
    assert of["step"] % 4 == 0, "every step takes the same"
    found = {
        "outside the blocks, a step": (of["step"] - of["step/pass/block"]) // 4,
        "step": of["step"] // 4,
        "clean pass": of["clean"] - of["clean/rotation"],
        "rotation, a chunk": of["rotation"] + of["clean/rotation"],
        "commit, a chunk": of["commit"],
        "chunk": counted.total("steady"),
        "crossings, a chunk": len(counted.crossed("steady")),
    }
    beside = found["chunk"] - of["step"] - of["clean"] - of["rotation"] - of["commit"]
    return found | {"beside all these, a chunk": beside}


def block(way: str, pass_: str) -> Counter[str]:
    """Operations by name that one block more takes in a noisy pass, "step", or in the clean one."""
    one, two = (taken(way, layers).names(f"steady/{pass_}") for layers in (1, 2))
    return Counter({name: count // (4 if pass_ == "step" else 1) for name, count in (two - one).items()})


@pytest.mark.parametrize("way", WAYS)
def test_a_chunk_takes_what_its_budget_says(way):
    """A layer more takes what the second one takes beside the first."""
    one, two = parts(way, 1), parts(way, 2)
    found = {name: one[name] + (LAYERS - 1) * (two[name] - one[name]) for name in one}
    found |= {"block": two["step"] - one["step"], "clean block": two["clean pass"] - one["clean pass"]}
    counted = taken(way, 2)
    found["its rotation"] = counted.total("steady/step/pass/block/1/rotated") // 4
    found["megabytes of a block"] = ceil(counted.total_bytes("steady/step/pass/block/1") / 4 / 1e6)
    assert not over_budget(found, BUDGET[way], EXACT)


def test_the_five_functions_are_all_that_is_left_between_linears_and_attentions():
    gelu = {"aten.addmm": 8, "aten.gelu": 1} if GELU_APART else {"aten.addmm": 7, "aten._addmm_activation": 1}
    others = gelu | {"attention": 2, "aten._fused_rms_norm": 1}
    assert block("compiled", "step") == others | dict.fromkeys(FIVE, 1)


@pytest.mark.parametrize("pass_", ["step", "clean"])
def test_nothing_in_a_compiled_block_is_copied_but_the_raw_keys(pass_):
    names = block("compiled", pass_)
    copies = {
        name: n for name, n in names.items() if any(word in name for word in ("copy", "clone", "cat", "contiguous"))
    }
    assert copies == ({} if pass_ == "step" else {"aten.copy_": 1})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pass_", ["step", "clean"])
def test_in_a_pass_of_either_way_nothing_waits_for_the_device(way, pass_):
    assert taken(way, 2).total(f"steady/{pass_}/pass") and not taken(way, 2).crossed(f"steady/{pass_}/pass")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(4)
def test_within_a_pass_nothing_waits_for_the_device_and_nothing_is_copied_to_it(case):
    changed, fill = CASES[case]
    with on_fake_cuda("1.3B", layers=2) as (host, counted):
        rollout = rollout_of(host, counted, **changed)
        if case == "rolling forcing":
            for _ in rollout.chunks(3 * (fill + 1)):
                pass
            assert not counted.crossed("pass/block")
            return
        part = steady_chunk(host, counted, rollout, fill)
    assert counted.total(f"{part}/step/pass")
    crossed = counted.crossed(f"{part}/step/pass") + counted.crossed(f"{part}/clean/pass")
    if case == "host memory":  # which fetches its frames layer by layer, from page-locked memory
        crossed = [found for found in crossed if found[1] != "aten.copy_.default"]
    assert not crossed


INTRUDERS = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: bool(x.isfinite().all()),
    "to the CPU": lambda x: x[0, 0].cpu(),
    "to the device": lambda x: torch.zeros(3).to(x.device),
    "numbers to the device": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "into a tensor of the device": lambda x: x[0, 0, :3].copy_(torch.zeros(3)),
    "places on the CPU": lambda x: x[0, 0][torch.tensor([1, 2])],
}


# of a size that only the numbers say: the stand-in refuses them anywhere
ASKING = {
    "a mask": lambda x: x[0, 0][torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)],
    "nonzero": lambda x: torch.nonzero(x[0, 0]),
}


def put_into_a_pass(intrude) -> list[tuple[str, str]]:
    """What crosses in the blocks of a step with something in their attention."""
    with on_fake_cuda("1.3B", layers=1) as (host, counted):
        rollout = rollout_of(host, counted)
        kernel = host.kernel

        def attention(q, k, v, heads):
            intrude(q)
            return kernel(q, k, v, heads)

        rollout.attention.kernel = attention
        part = steady_chunk(host, counted, rollout)
    return counted.crossed(f"{part}/step/pass/block")


@pytest.mark.parametrize("intruder", INTRUDERS)
@pytest.mark.sampled(3)
def test_what_is_put_into_a_pass_is_found(intruder):
    assert put_into_a_pass(INTRUDERS[intruder])


@pytest.mark.parametrize("intruder", ASKING)
def test_what_asks_for_a_size_is_refused(intruder):
    with pytest.raises(DynamicOutputShapeException):
        put_into_a_pass(ASKING[intruder])


def test_what_is_counted_as_one_and_what_is_not_counted():
    shown = []
    with fake_cuda() as (device, _), torch.no_grad(), CountedOps(lambda func, *_: shown.append(str(func))) as counted:
        x = torch.empty(2, 3, dtype=torch.bfloat16, device=device)
        with counted.part("a"):
            x.view(3, 2).transpose(0, 1)[0].unsqueeze(0)  # views
            torch.empty_like(x)
            (x + 1).mul_(x)
            with counted.part("b"):
                counted.one(lambda x: (x + 1).mul_(x), "both")(x)
            with counted.aside():
                x * 2
        torch.zeros(3) + 1  # on the CPU
    assert counted.ops["a"] == {"aten.add": 1, "aten.mul_": 1} and counted.ops["a/b"] == {"both": 1}
    assert (
        shown == ["aten.add.Tensor", "aten.mul_.Tensor"] and counted.names("a") == counted.ops["a"] + counted.ops["a/b"]
    )
    assert counted.total("a") == counted.total() == 3 and counted.total("b") == 1 and not counted.crossings
    # x read and x + 1 written; both read and one written; as one, x read and its like written
    assert counted.total_bytes("a") == 2 * 12 + 3 * 12 + 2 * 12 and counted.total_bytes("b") == 2 * 12


def test_a_budget_only_goes_down():
    budget = {"block": 3, "step": 5}
    assert not over_budget({"block": 3, "step": 5}, budget)
    assert not over_budget({"block": 2, "step": 5}, budget, exact=False)
    for counted in ({"block": 4, "step": 5}, {"block": 2, "step": 5}, {"block": 3}, {"block": 3, "step": 5, "more": 1}):
        assert len(over_budget(counted, budget)) == 1
