"""What a decode of 3 latents at 832x480 asks a GPU for, with the geometry of Wan 2.1's VAE, on CUDA tensors that are not there.

The numbers (tests/core/budgets.py) only go down. Counted without the check that
what was made is finite, and with the attention as one operation, as CUDA has it.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.diffusionmodules.model as modules
import comfy.ldm.wan.vae as wan
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from adastate_pack.adastate_core.decode import wan_vae
from adastate_pack.adastate_core.decode.wan_makes import VAE_2_1
from adastate_pack.adastate_core.decode.wan_vae import VaeStream
from adastate_pack.nodes.host import fast_vae
from budgets import DECODE, DECODE_IN_HALVES
from counted_ops import CountedOps, over_budget
from fake_cuda import fake_cuda

# newer hosts run the end of the decoder twice for each latent, on two frames at a time
HALVES = hasattr(wan.Decoder3d, "run_up")
BUDGET = DECODE_IN_HALVES if HALVES else DECODE
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# torch picks cuDNN for bfloat16 only where it sees a GPU that has it
DTYPE = torch.float16


def fake_vae() -> SimpleNamespace:
    """What fast_vae looks at of a host's VAE; inside fake_cuda."""
    geometry = dict(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            codec = wan.WanVAE(**geometry)
    finally:
        torch.set_default_dtype(before)
    codec.decoder.middle[1].optimized_attention = modules.pytorch_attention
    device = torch.device("cuda", 0)
    patcher = comfy.model_patcher.ModelPatcher(codec, load_device=device, offload_device=device)
    return SimpleNamespace(first_stage_model=codec, device=device, vae_dtype=DTYPE, patcher=patcher)


@pytest.fixture
def counted(monkeypatch):
    """Operations of a decode of 3 latents in the middle of a video, and its convolutions' tensors that lie otherwise than LAST."""

    def count(way: str, frames_per_call: int) -> tuple[CountedOps, list]:
        otherwise = []

        def seen(func, args, out):
            if "convolution" in func._schema.name:
                tensors = {"in": args[0], "weight": args[1], "out": out}
                otherwise.extend(
                    (name, tuple(t.shape), t.stride())
                    for name, t in tensors.items()
                    if not t.is_contiguous(memory_format=LAST[t.ndim])
                )

        counts = CountedOps(seen)
        attention = counts.one(lambda q, k, v, **more: torch.empty_like(q), "attention")
        monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", attention)
        monkeypatch.setattr(wan_vae, "require_finite", lambda *given: None)
        monkeypatch.setattr(fast_vae, "compiler_for", lambda device: (counts.one, ""))
        monkeypatch.setattr("adastate_pack.adastate_core.fused._MADE", {})
        with fake_cuda(), torch.no_grad():
            vae = fake_vae()
            if way == "fast":
                assert fast_vae.why_not(vae) == ""
                fast = fast_vae.FastVae(vae, VAE_2_1)
                fast.patcher.patch_model(load_weights=False)
                fast.ready(1, 60, 104, frames_per_call)
                assert fast.in_place and not fast.failed
            stream = VaeStream(vae.first_stage_model, frames_per_call)
            stream.layout = torch.channels_last_3d if way == "fast" else None
            z = torch.zeros(1, 16, 7, 60, 104, device="cuda", dtype=DTYPE)
            stream.step(z[:, :, :1])
            stream.step(z[:, :, 1:4])
            with counts, counts.part("decode"):
                pictures = stream.step(z[:, :, 4:])
            assert pictures.shape == (1, 12, 480, 832, 3)
        return counts, otherwise

    return count


@pytest.mark.parametrize("case", BUDGET)
def test_a_decode_of_three_latents_keeps_to_its_budget(counted, case):
    way, frames_per_call = case.removesuffix(" a call").split(", ")
    counts, _ = counted(way, int(frames_per_call))
    assert not over_budget({case: counts.total("decode")}, {case: BUDGET[case]}), counts.names("decode")
    assert not counts.crossings, "it waits for the device, or copies"
    assert "aten._to_copy" not in counts.names("decode"), "it converts"


def test_the_fast_way_has_one_operation_for_norm_and_silu(counted):
    names = counted("fast", 1)[0].names("decode")
    # 29 norms with SiLU behind them and one before the attention, 3 times; more where the last layers run twice
    assert names["norm"] == 3 and names["norm_silu"] == (126 if HALVES else 87)
    others = ("silu", "silu_", "linalg_vector_norm", "sum", "rsqrt_", "constant_pad_nd")
    assert not names.keys() & {f"aten.{name}" for name in others}


@pytest.mark.parametrize("frames_per_call", [1, 3])
def test_no_convolution_gets_or_gives_another_layout(counted, frames_per_call):
    counts, otherwise = counted("fast", frames_per_call)
    assert counts.names("decode")["aten.convolution"] >= 39 and otherwise == []


def test_the_count_sees_other_layouts(counted):
    counts, otherwise = counted("plain", 1)
    assert {name for name, *_ in otherwise} == {"in", "weight", "out"}
    # every convolution but those of one pixel, which lie both ways
    assert len(otherwise) >= 2 * 90 and counts.names("decode")["aten.silu"]
