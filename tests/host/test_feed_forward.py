"""GELU in the epilogue of a plain linear: near the modules called one by one, and only where nothing hinders."""

from __future__ import annotations

import pytest
import torch
from adastate_pack.nodes.host import fusing
from adastate_pack.nodes.host.feed_forward import feed_forward, gelu_linear, hindrance
from counted_ops import CountedOps
from fake_cuda import fake_cuda
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


@pytest.fixture(autouse=True)
def fake_weights(monkeypatch):
    monkeypatch.setattr(fusing, "_PLAIN_TENSORS", (*fusing._PLAIN_TENSORS, FakeTensor))


def ffn_of(operations=nn, dtype=torch.bfloat16, device="cpu", gelu=None) -> nn.Sequential:
    there = {"device": device, "dtype": dtype}
    made = nn.Sequential(
        operations.Linear(32, 96, **there), gelu or nn.GELU(approximate="tanh"), operations.Linear(96, 32, **there)
    )
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operation_gives_what_two_give_to_rounding(dtype):
    torch.manual_seed(0)
    ffn, x = ffn_of(dtype=dtype), torch.randn(2, 17, 32, dtype=dtype)
    two, one = ffn[1](ffn[0](x)), gelu_linear(ffn[0], x)
    assert one.shape == two.shape and one.dtype == dtype
    assert float((one - two).abs().max() / two.abs().max()) < 1e-2


def test_on_the_cpu_the_modules_are_called():
    ffn, x = ffn_of(), torch.randn(2, 17, 32, dtype=torch.bfloat16)
    assert torch.equal(feed_forward(ffn, x), ffn(x))


def counted(ffn, x) -> int:
    with CountedOps() as ops, torch.no_grad():
        assert feed_forward(ffn, x).shape == x.shape
    return ops.total()


def test_on_cuda_it_takes_an_operation_less():
    import comfy.ops

    with fake_cuda() as (device, _):
        x = torch.empty(2, 17, 32, dtype=torch.bfloat16, device=device)
        for operations in (nn, comfy.ops.disable_weight_init):
            ffn = ffn_of(operations, device=device)
            assert hindrance(ffn, x) is None and counted(ffn, x) == 2


def _lora(ffn):
    ffn[0].weight_function = [lambda weight: weight]


def _hook(ffn):
    ffn[0].register_forward_hook(lambda *_: None)


def _forward(ffn):
    ffn.forward = lambda x: nn.Sequential.forward(ffn, x)


def _casts(ffn):
    ffn[0].comfy_cast_weights = True


CHANGES = {"LoRA": _lora, "hook": _hook, "forward": _forward, "casts": _casts}


@pytest.mark.parametrize("change", [*CHANGES, "no bias", "gelu", "dtype", "float32", "subclass", "cpu weights"])
def test_every_reason_to_call_the_modules(change):
    class Other(nn.Linear):
        pass

    with fake_cuda() as (device, _):
        x = torch.empty(2, 17, 32, dtype=torch.float32 if change == "float32" else torch.bfloat16, device=device)
        ffn = ffn_of(device=device, dtype=x.dtype, gelu=nn.GELU() if change == "gelu" else None)
        if change in CHANGES:
            CHANGES[change](ffn)
        elif change == "no bias":
            ffn[0].bias = None
        elif change in ("dtype", "cpu weights"):
            there = {"dtype": torch.float8_e4m3fn} if change == "dtype" else {"device": "cpu"}
            ffn[0].weight = nn.Parameter(torch.empty_like(ffn[0].weight, **there), requires_grad=False)
        elif change == "subclass":
            ffn[0].__class__ = Other
        assert hindrance(ffn, x)
