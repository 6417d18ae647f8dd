"""The block's functions in the host's own Wan: the same bits where they are plain, six graphs where they are compiled, and each
reason for which a block is left as it is."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace

import comfy.ldm.wan.model as wan
import comfy.model_management
import comfy.sd
import pytest
import torch
from adastate_pack.adastate_core import fused as fused_module
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorDeep, AnchorEMA
from adastate_pack.adastate_core.fused import COMPILED, PLAIN, inductor
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.rope import Rope
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.nodes.host import fusing
from adastate_pack.nodes.host import model as adapter
from needs_compiler import needs_compiler
from torch._dynamo.utils import counters


class Counted:
    """A compiler that leaves functions as they are, and counts what is made and called."""

    def __init__(self) -> None:
        self.made, self.calls = [], []

    def __call__(self, function):
        self.made.append(function.__name__)

        def run(*arguments):
            self.calls.append(function.__name__)
            return function(*arguments)

        return run


@pytest.fixture
def with_compiler(monkeypatch):
    """with_compiler(c): models on the CPU are compiled by `c` from now on."""
    monkeypatch.setattr(fused_module, "_MADE", {})

    def use(compiler):
        monkeypatch.setattr(fusing, "compiler_for", lambda device: (compiler, "" if compiler else "nobody compiles"))
        return compiler

    return use


@pytest.fixture
def half(wan_state, monkeypatch):
    """A MODEL whose weights and activations are bfloat16, as on a GPU."""
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args, **kwargs: None)
    state = {name: value.bfloat16() for name, value in wan_state.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.bfloat16})


@torch.inference_mode()
def rolled(model, positive, length=12, anchor=None, batch=1, state=None, chunks=None, inside=None, **changed):
    """(latents, rollout, host model) of a rollout of two steps; `inside` are given frames inside the first chunk."""
    host = adapter.HostModel(model, positive[0][0], batch)
    values = {"positions": "packed", "window_frames": 6, "chunk_frames": 3} | changed
    spec = RolloutSpec(host.geometry, batch, 4, 4, anchor=anchor or Anchor(), dtype=host.dtype, **values)
    plan = spec.plan(5, resumed=state)
    host.load(plan)
    host.told = host.fuse(spec, plan, state, inside=inside is not None)
    sigmas = Schedule.shifted(max(2, spec.blocks), 5.0)
    rollout = Rollout(host, spec, Settings(3, sigmas), state=state)
    latents = torch.cat([chunk.latents for chunk in rollout.chunks(length, inside, "inside")], 2)
    return latents, rollout, host


def same(one, other):
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1].snapshot().cache, other[1].snapshot().cache, strict=True):
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


CASES = {
    "none": {},
    "state": {"anchor": AnchorAdaptive(1)},
    "ema": {"anchor": AnchorEMA(2, 0.5)},
    "rolling": {"blocks": 3},
    "batch": {"batch": 2},
    "8 bits": {"cache_dtype": "int8"},
    "deep": {"anchor": AnchorDeep(2, 4, 8), "length": 18},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_functions_give_the_bits_of_the_way_before(model, half, positive, with_compiler, name, dtype):
    chosen = model if dtype == "float32" else half
    assert adapter.compute_dtype(chosen) == getattr(torch, dtype)
    with_compiler(None)
    before = rolled(chosen, positive, **CASES[name])
    assert before[2].fused_blocks.way == PLAIN
    counted = with_compiler(Counted())
    now = rolled(chosen, positive, **CASES[name])
    assert now[2].fused_blocks.way == COMPILED and len(counted.calls) > 2 * len(counted.made)
    same(now, before)


@pytest.mark.parametrize("frames", [0, 2], ids=["no frames given", "two inside"])
@pytest.mark.parametrize("anchor", [Anchor(), AnchorAdaptive(1)], ids=lambda anchor: anchor.kind)
def test_every_call_of_a_rollout_was_prepared_while_it_loaded(model, positive, with_compiler, anchor, frames):
    counted = with_compiler(Counted())
    inside = torch.randn(1, 16, frames, 4, 4) if frames else None
    _, rollout, host = rolled(model, positive, length=15, anchor=anchor, inside=inside)
    modulate = ("norm_modulate", "gate_norm", "add_norm_modulate", "gate")
    # with one timestep a frame the modulations have another shape
    assert sorted(counted.made) == sorted([*fusing.FUNCTIONS, *(modulate if frames else ())])
    passes = 5 * 3
    expected = {name: 2 * passes for name in modulate}
    expected |= {"norm_rotate": 2 * 5 * 2, "norm_rotate_raw": 2 * 5}
    # and once each to prepare them
    assert {name: counted.calls.count(name) - counted.made.count(name) for name in expected} == expected
    assert rollout.snapshot().compiled_layers == (0, 1)


@needs_compiler
def test_compiled_are_six_graphs_for_all_layers_and_chunks(model, positive, with_compiler, monkeypatch):
    monkeypatch.setattr(Rope, "__init__", functools.partialmethod(Rope.__init__, real_pairs=True))
    with_compiler(None)
    plain, *_ = rolled(model, positive, length=24, anchor=AnchorAdaptive(1))
    torch._dynamo.reset()
    counters.clear()
    with_compiler(inductor)
    compiled, _, host = rolled(model, positive, length=24, anchor=AnchorAdaptive(1))
    assert host.fused_blocks.way == COMPILED, host.fused_blocks.why
    assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]
    assert not any("recompile" in key for key in counters) and len(counters["recompiles"]) == 0
    assert (compiled - plain).abs().max() <= 1e-6 * plain.abs().max()
    assert not torch.equal(compiled, plain)


def patched(model):
    """A LoRA on one norm that is not merged, as the host keeps it where weights do not fit."""
    comfy.model_management.load_models_gpu([model])
    return patch_norm(model)


def patch_norm(model):
    norm = model.model.diffusion_model.blocks[1].norm3
    norm.weight_function = [lambda weight: weight + 1]
    return "its norm3 is patched"


def cast(model):
    """A weight in another dtype than the activations', as fp8 and fp16 files have them."""
    norm = model.model.diffusion_model.blocks[1].self_attn.norm_k
    norm.weight = torch.nn.Parameter(norm.weight.half())
    norm.comfy_cast_weights = True
    return "its self_attn.norm_k is cast from torch.float16"


def packed(model):
    """A weight that is no plain tensor, as GGUF's."""

    class Packed(torch.Tensor):
        pass

    norm = model.model.diffusion_model.blocks[1].self_attn.norm_q
    del norm.weight
    norm.weight = norm._parameters["weight"] = torch.Tensor._make_subclass(Packed, torch.ones(128))
    return "its self_attn.norm_q holds a Packed"


def hooked(model):
    model.model.diffusion_model.blocks[1].norm2.register_forward_hook(lambda module, given, out: out)
    return "its norm2 has hooks"


def other_norm(model):
    model.model.diffusion_model.blocks[1].norm3 = torch.nn.Identity()
    return "its norm3 is a Identity"


def own_forward(model):
    norm = model.model.diffusion_model.blocks[1].norm1
    norm.forward = norm.forward
    return "its norm1 is a LayerNorm that the functions do not stand for"


def cast_modulation(model):
    block = model.model.diffusion_model.blocks[1]
    block.modulation = torch.nn.Parameter(block.modulation.half())
    return "its modulation is torch.float16"


def other_block(model):
    """As a control model's."""
    model.model.diffusion_model.blocks[1].__class__ = type("VaceWanAttentionBlock", (wan.WanAttentionBlock,), {})
    return "it is a VaceWanAttentionBlock"


def other_attention(model):
    attention = model.model.diffusion_model.blocks[1].cross_attn
    attention.__class__ = type("OtherCrossAttention", (wan.WanT2VCrossAttention,), {})
    return "it is a OtherCrossAttention"


def replaced(model):
    block = model.model.diffusion_model.blocks[1]
    block.forward = functools.partial(wan.WanAttentionBlock.forward, block)
    return "another pack has replaced its forward"


REASONS = [
    patched, cast, packed, hooked, other_norm, own_forward, cast_modulation, other_block, other_attention, replaced,
]  # fmt: skip


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.__name__)
def test_each_reason_leaves_a_block_as_it_is(model, positive, with_compiler, reason):
    why = reason(model)
    counted = with_compiler(Counted())
    now, rollout, host = rolled(model, positive)
    assert host.fused_blocks.compiled_layers == rollout.snapshot().compiled_layers == (0,)
    assert len(host.fused_blocks.why) == 1 and host.fused_blocks.why[0].startswith(why)
    assert counted.calls.count("gate") - 1 == 4 * 3
    with_compiler(None)
    assert torch.equal(now, rolled(model, positive)[0])


def test_a_whole_model_that_is_cast_goes_the_plain_way(wan_state, positive, with_compiler):
    options = {"dtype": torch.float8_e4m3fn}
    small = comfy.sd.load_diffusion_model_state_dict(
        {k: v.clone() for k, v in wan_state.items()}, model_options=options
    )
    counted = with_compiler(Counted())
    _, rollout, host = rolled(small, positive)
    assert host.fused_blocks.way == PLAIN and not counted.made and rollout.snapshot().compiled_layers == ()
    assert host.fused_blocks.why == (
        f"its modulation is {torch.float8_e4m3fn} on cpu, to be cast to {host.dtype} on cpu",
    )


def test_loras_fp8_linears_and_offloaded_linears_stay_compiled(model, positive, with_compiler):
    """What is done to a linear is no matter of the functions."""
    added = model.clone()
    delta = {f"blocks.{i}.self_attn.{n}.weight": 0.05 * torch.randn(128, 128) for i in range(2) for n in "qkvo"}
    added.add_patches({f"diffusion_model.{name}": ("diff", (value,)) for name, value in delta.items()})
    linear = added.model.diffusion_model.blocks[0].ffn[0]
    linear.weight, linear.comfy_cast_weights = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), False), True
    with_compiler(Counted())
    now, _, host = rolled(added, positive)
    assert host.fused_blocks.compiled_layers == (0, 1)
    with_compiler(None)
    assert torch.equal(now, rolled(added, positive)[0])


def test_a_block_whose_norm_moves_during_a_run_is_plain_from_there_on(model, positive, with_compiler, caplog):
    """The host takes weights off the device when another model needs the room."""
    with_compiler(Counted())
    _, rollout, host = rolled(model, positive, length=6)
    patch_norm(model)
    with torch.inference_mode(), caplog.at_level(logging.WARNING, "adastate"):
        list(rollout.chunks(12))
    assert rollout.snapshot().compiled_layers == (0,) and "its norm3 is patched" in host.fused_blocks.why[0]
    assert len([text for text in caplog.messages if "block 1 goes the plain way" in text]) == 1


def test_a_newer_hosts_own_fused_parts_are_left_to_it(model, positive, with_compiler, monkeypatch):
    monkeypatch.setattr(wan, "modulate", lambda *args: None, raising=False)
    counted = with_compiler(Counted())
    now, *_ = rolled(model, positive, anchor=AnchorAdaptive(1))
    assert set(counted.calls) == {"norm_rotate", "norm_rotate_raw"}
    monkeypatch.undo()
    assert torch.equal(now, rolled(model, positive, anchor=AnchorAdaptive(1))[0])


def test_a_run_goes_on_the_way_its_state_was_made(model, positive, with_compiler):
    with_compiler(None)
    plain = rolled(model, positive, length=9)[1].snapshot()
    counted = with_compiler(Counted())
    compiled = rolled(model, positive, length=9)[1].snapshot()
    assert (plain.compiled_layers, compiled.compiled_layers) == ((), (0, 1))
    counted.calls.clear()
    for state, way in ((plain, PLAIN), (compiled, COMPILED)):
        *_, host = rolled(model, positive, state=state)
        assert host.fused_blocks.way == way and host.told is None and bool(counted.calls) == (way == COMPILED)
    with_compiler(None)
    *_, host = rolled(model, positive, state=compiled)
    assert "compiled functions in 2 layers, and here they are in 0 (nobody compiles)" in host.told
    assert "not those of a run that had not been stopped" in host.told


def test_a_state_that_has_some_layers_compiled_has_the_same_ones_later(model, positive, with_compiler):
    with_compiler(Counted())
    state = rolled(model, positive, length=9)[1].snapshot()
    *_, host = rolled(model, positive, state=replace(state, compiled_layers=(1,)))
    assert host.fused_blocks.compiled_layers == (1,) and host.told is None
    patched(model)
    *_, host = rolled(model, positive, state=state)
    assert "in 2 layers, and here they are in 1 (its norm3 is patched" in host.told


def test_the_node_says_the_way_and_that_bits_differ(rollout, with_compiler):
    with_compiler(Counted())
    first = rollout()
    report = json.loads(first.args[2])
    assert report["blocks"] == {"way": COMPILED, "compiled": 2, "of": 2, "why_plain": []}
    assert not any("compiled" in warning for warning in report["warnings"])
    with_compiler(None)
    second = json.loads(rollout(resume=first.args[1], length=45).args[2])
    assert second["blocks"] == {"way": PLAIN, "compiled": 0, "of": 2, "why_plain": ["nobody compiles"]}
    assert any("compiled functions in 2 layers" in warning for warning in second["warnings"])


def test_compiling_shows_progress_and_can_be_cancelled(rollout, with_compiler, progress_told, interrupt):
    counted = with_compiler(Counted())
    made = counted.made

    def compile_one(function):
        if len(made) == 2:
            comfy.model_management.interrupt_current_processing()
        return Counted.__call__(counted, function)

    with_compiler(compile_one)
    with pytest.raises(interrupt):
        rollout()
    assert len(made) == 3 and [told[:2] for told in progress_told] == [(0, 6), (1, 6), (2, 6)]


def test_a_compiler_that_fails_is_one_warning_and_the_plain_way(rollout, with_compiler, caplog):
    with_compiler(None)
    expected = rollout().args[0]["samples"]

    def broken(function):
        raise RuntimeError("no such register")

    with_compiler(broken)
    with caplog.at_level(logging.WARNING, "adastate"):
        out = rollout()
    assert torch.equal(out.args[0]["samples"], expected)
    assert len([text for text in caplog.messages if "could not be compiled" in text]) == 1
    blocks = json.loads(out.args[2])["blocks"]
    assert blocks["way"] == PLAIN and "no such register" in blocks["why_plain"][0]


def test_the_sampler_goes_the_same_way(model, positive, with_compiler):
    """Its forwards are put in place and taken away again."""
    counted = with_compiler(Counted())
    block, memory = model.model.diffusion_model.blocks[0], adapter.HostModel(model, positive[0][0], 1).memory
    comfy.model_management.load_models_gpu([model])
    with adapter.attention_in_place(model, memory):
        assert "block_forward" in block.forward.__qualname__
    assert "forward" not in vars(block) and not counted.calls
