"""The five functions of a Wan block: what they compute, and that each is one kernel when it is compiled (here for the CPU)."""

from __future__ import annotations

import re
from functools import cache
from math import prod

import pytest
import torch
from needs_compiler import needs_compiler
from torch._inductor.utils import run_and_get_code

from adastate_core.attention.block import FUNCTIONS
from adastate_core.fused import Fused, inductor
from adastate_core.rope import Rope

TOKENS, FRAMES, HEADS, WIDTH = 6, 4, 2, 64
EPS = 1e-6
FORMS = [(torch.float32, 1), (torch.bfloat16, FRAMES)]


def arguments(name: str, dtype: torch.dtype, timesteps: int, seed: int = 0):
    """Random ones; slots are views of larger buffers, as a cache's are."""
    torch.manual_seed(seed)
    n = TOKENS * FRAMES

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    x, y, v = (random(1, n, WIDTH) for _ in range(3))
    rows, weights = (random(1, 6, WIDTH), random(1, timesteps, 6, WIDTH)), (random(WIDTH), random(WIDTH))
    if name.startswith("norm_rotate"):
        turn = Rope(WIDTH // HEADS, 2, 3, real_pairs=True).turn(None, [5, 6, 7, 8])
        slots = [torch.zeros(1, 9, TOKENS, WIDTH, dtype=dtype)[0, 2 : 2 + FRAMES].flatten(0, 1)[None] for _ in "kv"]
        return x, y, v, *weights, (EPS, 1e-5), turn.parts, turn.tokens, HEADS, *slots
    return {
        "norm_modulate": (x, *rows, EPS),
        "gate_norm": (x, y, *rows, *weights, EPS),
        "add_norm_modulate": (x, y, *rows, EPS),
        "gate": (x, y, *rows),
    }[name]


def results(name: str, function, given) -> list[torch.Tensor]:
    """All that a function gives and writes."""
    out = function(*given)
    return [*([out] if isinstance(out, torch.Tensor) else out), *(given[-2:] if name.startswith("norm_rotate") else ())]


def slow(name: str, given) -> list[torch.Tensor]:
    """The same in float64, token by token."""
    tensors = [[p.double() for p in t] if isinstance(t, tuple) and isinstance(t[0], torch.Tensor) else t for t in given]
    tensors = [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]

    def norm(token, eps, weight=1.0, bias=0.0):
        centred = token - token.mean()
        return centred / (centred.square().mean() + eps).sqrt() * weight + bias

    def rms(token, eps, weight):
        return token / (token.square().mean() + eps).sqrt() * weight

    def turned(token, cosines, sines):
        out = torch.empty_like(token)
        for h in range(HEADS):
            for j in range(0, WIDTH // HEADS, 2):
                a, b = token[h * WIDTH // HEADS + j : h * WIDTH // HEADS + j + 2]
                cosine, sine = cosines[0, j], sines[0, j + 1]
                out[h * WIDTH // HEADS + j] = a * cosine - b * sine
                out[h * WIDTH // HEADS + j + 1] = a * sine + b * cosine
        return out

    made = []
    for i in range(TOKENS * FRAMES):
        if name.startswith("norm_rotate"):
            q, k, v, q_weight, k_weight, eps, (cosines, sines), *_ = tensors
            q, k = rms(q[0, i], eps[0], q_weight), rms(k[0, i], eps[1], k_weight)
            raw = [k] if name.endswith("raw") else []
            made.append([turned(q, cosines[i], sines[i]), *raw, turned(k, cosines[i], sines[i]), v[0, i]])
            continue
        x, y = tensors[0][0, i], tensors[1][0, min(i, tensors[1].shape[1] - 1)]
        modulation, e = tensors[1:3] if name == "norm_modulate" else tensors[2:4]
        rows = modulation[0] + e[0, i * e.shape[1] // (TOKENS * FRAMES)]
        if name == "norm_modulate":
            made.append([norm(x, EPS) * (1 + rows[1]) + rows[0]])
        elif name == "gate":
            made.append([x + y * rows[5]])
        elif name == "gate_norm":
            x = x + y * rows[2]
            made.append([x, norm(x, EPS, *tensors[4:6])])
        else:
            x = x + y
            made.append([x, norm(x, EPS) * (1 + rows[4]) + rows[3]])
    return [torch.stack(one)[None] for one in zip(*made, strict=True)]


@pytest.mark.parametrize("timesteps", [1, FRAMES])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_they_compute(name, timesteps):
    found = results(name, FUNCTIONS[name], arguments(name, torch.float32, timesteps))
    for one, expected in zip(found, slow(name, arguments(name, torch.float32, timesteps)), strict=True):
        torch.testing.assert_close(one.double(), expected, atol=3e-6, rtol=3e-6)


@cache
def compiled(name: str, dtype: torch.dtype, timesteps: int) -> tuple[Fused, str]:
    """The function, compiled for the CPU, and the code that was generated for it."""
    fused = Fused(FUNCTIONS, inductor)
    with torch.inference_mode():
        _, code = run_and_get_code(fused.prepare, name, *arguments(name, dtype, timesteps))
    assert fused.way == "compiled", fused.why
    return fused, "\n".join(code)


@needs_compiler
@pytest.mark.parametrize(("dtype", "timesteps"), FORMS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(8)
def test_compiled_each_is_one_kernel(name, dtype, timesteps):
    """And nothing of the size of activations is put into memory but what the function gives."""
    _, code = compiled(name, dtype, timesteps)
    assert code.count("async_compile.cpp") == 1 and "extern_kernels." not in code.partition("def call")[2]
    buffers = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    large = [one for one in buffers if prod(int(n) for n in one.split(",") if n.strip()) >= TOKENS * FRAMES * WIDTH]
    assert len(large) == {"norm_rotate_raw": 2, "gate_norm": 2, "add_norm_modulate": 2}.get(name, 1)


@needs_compiler
@pytest.mark.parametrize(("dtype", "timesteps"), FORMS, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.sampled(3)
def test_compiled_they_give_the_same_numbers(name, dtype, timesteps):
    fused, _ = compiled(name, dtype, timesteps)
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    with torch.inference_mode():
        given = [arguments(name, dtype, timesteps, seed=3) for _ in range(2)]
        assert fused.prepared(name, *given[0])
        for one, plain in zip(
            results(name, lambda *a: fused(name, *a), given[0]), results(name, FUNCTIONS[name], given[1]), strict=True
        ):
            assert (one - plain).abs().max() <= bound * plain.abs().max()
