"""The VAE's norm with SiLU as one function: the host's numbers, one loop where it is compiled."""

from __future__ import annotations

import re

import pytest
import torch
from needs_compiler import needs_compiler
from torch.nn import functional

from adastate_core.decode.norm_silu import FUNCTIONS, norm, norm_silu
from adastate_core.fused import Fused, inductor


def pixels(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = (3 * torch.randn(rows, channels, generator=generator)).to(dtype)
    gain = channels**0.5 * (1 + 0.3 * torch.randn(channels, generator=generator))
    return x, gain


def exactly(name: str, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What the host's layers compute (normalize, then times scale and gamma, then SiLU), in float64."""
    made = functional.normalize(x.double(), dim=1) * gain.double()
    return functional.silu(made) if name == "norm_silu" else made


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("channels", [1, 4, 96, 384])
def test_they_are_the_hosts_layers(name, channels):
    x, gain = pixels(70, channels)
    before = x.clone()
    torch.testing.assert_close(FUNCTIONS[name](x, gain).double(), exactly(name, x, gain), atol=2e-6, rtol=2e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_they_round_once(dtype):
    x, gain = pixels(500, 96, dtype)
    made = norm_silu(x, gain)
    assert made.dtype == dtype
    once = exactly("norm_silu", x, gain).to(dtype)
    # at most the neighbour of the nearest number, and nearly always that one
    assert (made != once).double().mean() < 0.01
    torch.testing.assert_close(made, once, atol=0, rtol=2 * torch.finfo(dtype).eps)
    steps = functional.silu(functional.normalize(x, dim=1) * gain.to(dtype))
    assert (steps != once).double().mean() > 0.1


def test_what_is_nothing_stays_nothing():
    """As the host's norm, which divides by no less than 1e-12."""
    gain = torch.ones(4)
    x = torch.tensor([[0.0, 0, 0, 0], [1e-13, 0, 0, 0], [1e-20, 0, 0, 0], [1e-6, 0, 0, 0], [1e15, 0, 0, 0]])
    torch.testing.assert_close(norm(x, gain).double(), exactly("norm", x, gain), atol=1e-12, rtol=1e-6)
    assert torch.isnan(norm(torch.tensor([[float("nan"), 1, 1, 1]]), gain)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(2)
def test_each_is_one_loop_where_it_is_compiled(name, dtype):
    from torch._inductor.utils import run_and_get_code

    x, gain = pixels(640, 96, dtype)
    with torch.no_grad():
        made, sources = run_and_get_code(inductor(FUNCTIONS[name]), x, gain)
    [source] = sources
    assert len(re.findall(r"= async_compile\.cpp_pybinding", source)) == 1
    # one loop over the rows: what is made of a row is read and written while it is at hand
    assert len(re.findall(r"for\(int64_t x0=", source)) == 1 and "extern_kernels." not in source.split("def call")[1]
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 2
    torch.testing.assert_close(made, FUNCTIONS[name](x, gain), atol=1e-6, rtol=tolerance)


@needs_compiler
def test_compiled_they_are_found_by_their_shapes():
    fused = Fused(FUNCTIONS, inductor)
    x, gain = pixels(64, 16)
    with torch.no_grad():
        fused.prepare("norm_silu", x, gain)
        assert fused.prepared("norm_silu", x, gain) and not fused.prepared("norm_silu", *pixels(65, 16))
        torch.testing.assert_close(fused("norm_silu", x, gain), norm_silu(x, gain), atol=1e-6, rtol=1e-6)
