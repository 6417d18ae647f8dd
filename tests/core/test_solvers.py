"""Euler and UniPC: against float64 written another way, against ODEs with a known solution, and in rollouts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from slow_rollout import slow_rollout
from systems_fast import latents_of
from test_rollout import ANCHORS, W_PIXELS, H, slow_numbers, spec_for
from tiny_model import TinyModel

from adastate_core import rollout as rollout_module
from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.rollout import Rollout, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.schedules.solvers import SAMPLERS, correction
from adastate_core.states.state_file import load_state, save_state

FOUR = (0.99979985, 0.93726546, 0.83305538, 0.62468737)
LISTS = {
    "one": (0.9,),
    "two": (1.0, 0.5),
    "longlive": FOUR,
    "from noise alone": Schedule.shifted(6, 3.0).sigmas,
    "uneven": (0.999, 0.99, 0.5, 0.47, 0.46, 0.1, 1e-4),
    "fifty": Schedule.shifted(50, 5.0).sigmas,
}


def slow_euler(x, v, sigmas):
    for i, sigma in enumerate(sigmas):
        below = sigmas[i + 1] if i + 1 < len(sigmas) else 0.0
        x = x + (below - sigma) * v(x, sigma)
    return x


def slow_unipc(x, v, sigmas):
    """UniPC-2 (bh2) as the linear systems of its paper, solved, order by order; the published code halves two of them."""
    # so far away where all is noise that what is left of its formulas is their limit
    levels = [math.log1p(-s) - math.log(s) if s < 1 else -1e12 for s in sigmas] + [math.inf]
    seen, x, begun = [], x.double(), None

    def weights(i, order):
        """r of the estimates before, and the system R w = b of the jump that begins at level i."""
        h = levels[i + 1] - levels[i]
        r = [(levels[i - k] - levels[i]) / h for k in range(1, order)] + [1.0]
        R = np.array([[each**k for each in r] for k in range(order)])
        whole, phi, factorial, b = np.expm1(-h), np.expm1(-h) / -h - 1, 1, []
        for k in range(1, order + 1):
            b.append(phi * factorial / whole)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        return r, R, np.array(b), whole

    for i, sigma in enumerate(sigmas):
        m = x - sigma * v(x, sigma)
        if i:
            order = min(2, i)
            r, R, b, whole = weights(i - 1, order)
            w = np.linalg.solve(R, b) if order == 2 else np.array([0.5])
            D = [(seen[-1 - k] - seen[-1]) / r[k - 1] for k in range(1, order)] + [m - seen[-1]]
            far = 1 - sigma
            x = sigma / sigmas[i - 1] * begun - far * whole * (seen[-1] + sum(a * d for a, d in zip(w, D, strict=True)))
        begun, seen = x, [*seen, m]
        order = min(2, i + 1, len(sigmas) - i)
        if i + 1 == len(sigmas):
            return m
        r, _, _, whole = weights(i, order)
        more = 0.5 * (seen[-2] - m) / r[0] if order == 2 else 0.0
        x = sigmas[i + 1] / sigma * x - (1 - sigmas[i + 1]) * whole * (m + more)
    return x


SLOW = {"euler": slow_euler, "unipc": slow_unipc}


def solved(name, x, v, sigmas):
    solver = SAMPLERS[name](sigmas, x[None])
    x = solver.start
    for step, sigma in enumerate(sigmas):
        x0, x = solver.step(step, x, v(x, sigma))
    assert torch.equal(x, x0)
    return x


def curved(x, sigma):
    return torch.tanh(1.7 * x) * (1 + sigma) + torch.sin(5 * sigma * x)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("sigmas", LISTS.values(), ids=LISTS)
def test_equals_float64_written_another_way(name, sigmas):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    slow = SLOW[name](x.double(), curved, sigmas)
    torch.testing.assert_close(solved(name, x, curved, sigmas).double(), slow, atol=1e-5, rtol=1e-5)


def test_a_correction_is_exact_for_quadratic_estimates():
    """Against the integral of exp(lambda) x0(lambda), by Gauss and Legendre."""
    points, weights = np.polynomial.legendre.leggauss(40)
    for before, begin, end in ((0.99, 0.9, 0.7), (0.9, 0.6, 0.59), (0.9, 0.6, 0.599999), (0.6, 0.5, 0.01)):
        last, first = (math.log((1 - s) / s) for s in (end, begin))
        at = (points + 1) / 2 * (last - first) + first

        def estimate(level):
            return 0.3 - 0.5 * level + 0.2 * level * level

        area = (np.exp(at) * estimate(at) * weights).sum() * (last - first) / 2
        keep, parts = correction((before, begin, end))
        known = [estimate(math.log((1 - s) / s)) for s in (end, begin, before)]
        got = keep * 1.5 + sum(part * one for part, one in zip(parts, known, strict=True))
        assert got == pytest.approx(end / begin * 1.5 + end * area, rel=1e-9)


@pytest.mark.parametrize(("name", "least", "most"), [("euler", 1.9, 2.15), ("unipc", 3.8, 4.3)])
def test_half_the_step_is_so_much_nearer(name, least, most):
    """Data of normal numbers with deviation 0.4: the flow from noise x ends at 0.4 x."""

    def v(x, sigma):
        return x * (sigma - (1 - sigma) * 0.16) / ((1 - sigma) ** 2 * 0.16 + sigma**2)

    x = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(solved(name, x, v, tuple(1 - i / n for i in range(n))).item() - 0.4) for n in (40, 80, 160)]
    assert all(least < a / b < most for a, b in zip(errors, errors[1:], strict=False)), errors


@pytest.mark.parametrize(
    "sigmas",
    [tuple(1 - i / 1000 for i in range(1000)), (0.6, 0.5, 0.5 - 1e-16, 0.5 - 1e-8, 0.4, 0.3)],
    ids=["1000", "standing still"],
)
def test_lists_that_are_long_or_nearly_stand_still_are_no_nonsense(sigmas):
    x = torch.randn(8, generator=torch.Generator().manual_seed(1))
    near = solved("unipc", x, curved, tuple(dict.fromkeys(round(sigma, 6) for sigma in sigmas)))
    torch.testing.assert_close(solved("unipc", x, curved, sigmas), near, atol=2e-2, rtol=2e-2)


def run(sampler, *, anchor="none", length=12):
    model = TinyModel()
    rollout = Rollout(
        model, spec_for(model, batch=2, anchor=ANCHORS[anchor]), Settings(7, Schedule(FOUR, sampler=sampler))
    )
    return latents_of(rollout, length), rollout


@pytest.mark.parametrize("anchor", ["none", "static3", "ema2", "adaptive1", "adaptive2behind"])
@pytest.mark.parametrize("sampler", SLOW)
@pytest.mark.sampled(2)
def test_a_rollout_equals_the_slow_one(sampler, anchor):
    """Two videos, with and without state frames, over a window that was left. semantics: Samplers."""
    got, rollout = run(sampler, anchor=anchor)

    def solve(x, v, sigmas):
        return SLOW[sampler](x.double(), lambda y, sigma: v(y.float(), sigma).double(), sigmas).float()

    slow = slow_rollout(
        rollout.model, batch=2, h=H, w=W_PIXELS, F=3, W=3, seed=7, sigmas=FOUR, length=12, solve=solve,
        **slow_numbers(ANCHORS[anchor]),
    )  # fmt: skip
    torch.testing.assert_close(got, slow["latents"], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("sampler", SLOW)
def test_only_the_first_noise_of_a_chunk_is_drawn(sampler, monkeypatch):
    drawn, noise = [], rollout_module.noise
    monkeypatch.setattr(rollout_module, "noise", lambda *a, **k: drawn.append(a[1:3]) or noise(*a, **k))
    run(sampler, anchor="adaptive1")
    assert sorted(drawn) == [(chunk, 0) for chunk in range(4) for _ in "cs"]  # of content and state
    drawn.clear()
    run("renoising", length=3)
    assert drawn == [(0, step) for step in range(4)]


ABSORBED = AbsorptionSettings(warmup_frames=6, local_window_frames=1, sink_frames=1, ratio=0.5)
MET = {
    "plain": dict(),
    "a past at its own level": dict(kept=(0, 2)),
    "a past that is made anew": dict(remade="first"),
    "absorption": dict(absorption=ABSORBED, W=9, batch=1, length=21),
    "the first chunk by its own list": dict(first=(0.9, 0.5)),
}


@pytest.mark.parametrize("met", MET.values(), ids=MET)
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_a_rollout_goes_on_from_files_bit_for_bit(sampler, met, tmp_path):
    """Between all chunks; and is another than by re-noising. With one step all samplers are one."""
    length, first = met.get("length", 12), met.get("first", ())
    changed = {name: value for name, value in met.items() if name not in ("length", "first", "kept")}

    def made(sampler, sigmas=FOUR, state=None):
        model = TinyModel()
        schedule = Schedule(
            sigmas, first_sigmas=first, kept=met.get("kept", ()) if len(sigmas) > 1 else (), sampler=sampler
        )
        return Rollout(model, spec_for(model, **({"batch": 2} | changed)), Settings(7, schedule), state=state)

    whole, state, parts = latents_of(made(sampler), length), None, []
    for end in range(3, length + 1, 3):
        rollout = made(sampler, state=state)
        parts.append(latents_of(rollout, end))
        state = load_state(save_state(rollout.snapshot(), tmp_path / "a.state.safetensors"))
    assert torch.equal(torch.cat(parts, 2), whole)
    assert (whole - latents_of(made("renoising"), length)).abs().max() > 1e-2
    if not first:
        assert torch.equal(latents_of(made(sampler, (0.9,)), length), latents_of(made("renoising", (0.9,)), length))


def test_chunks_that_are_made_again_are_the_same():
    _, rollout = run("unipc", length=6)
    state = rollout.snapshot()
    after = latents_of(rollout, 12)
    rollout.go_back(state)
    assert torch.equal(latents_of(rollout, 12), after)
