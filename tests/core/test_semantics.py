"""Every section of docs/semantics.md is held by a test that names it; here are those numbers that no other test holds."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel

from adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic
from adastate_core.geometry import WAN21
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.rope import Layout
from adastate_core.schedules.noise import noise
from adastate_core.schedules.schedule import Schedule

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "semantics.md"


def headings() -> list[str]:
    return re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.M)


def test_every_section_is_named_by_a_test_and_every_name_is_a_section():
    named = set()
    for file in [*TESTS.glob("*/test_*.py"), *TESTS.glob("*/slow_*.py")]:
        named |= set(re.findall(r"semantics: ([A-Z][^;.\n\"]*)", file.read_text(encoding="utf-8")))
    assert named == set(headings()) - {"The letters"}


class Recorder(TinyModel):
    """Notes what each pass is given and how many tokens its queries see in the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[tuple[torch.Tensor, float, int]] = []

    def velocity(self, x, timestep, attention):
        kernel, seen = attention.kernel, []
        attention.kernel = lambda q, k, v, heads: seen.append(k.shape[1]) or kernel(q, k, v, heads)
        v = super().velocity(x, timestep, attention)
        attention.kernel = kernel
        self.passes.append((x.clone(), timestep, seen[0]))
        return v


def rolled(anchor: Anchor, frames: int, steps: int = 2, window: int = 3) -> tuple[Recorder, Rollout, list]:
    model = Recorder()
    spec = RolloutSpec(model.geometry, 1, 4, 6, 3, window, anchor, "packed", torch.float32)
    rollout = Rollout(model, spec, Settings(11, Schedule.shifted(steps, 5.0)))
    return model, rollout, list(rollout.chunks(frames))


def test_lengths():
    """semantics: Lengths."""
    for length in range(1, 200):
        latents = (length - 1) // 4 + 1
        assert WAN21.latents(length) == latents
        assert WAN21.whole(length) == WAN21.pictures(latents) <= length < WAN21.pictures(latents + 1)
    _, rollout, chunks = rolled(Anchor(), 4)
    assert [c.latents.shape[2] for c in chunks] == [3, 1]
    assert rollout.snapshot().pending.shape[2] == 2


@pytest.mark.parametrize("state", [False, True])
def test_noise(state):
    """semantics: Noise."""
    text = "11/3/2/state" if state else "11/3/2"
    number = 0
    for byte in hashlib.sha256(text.encode("ascii")).digest()[:8]:
        number = 256 * number + byte
    expected = torch.randn([2, 3, 4], generator=torch.Generator("cpu").manual_seed(number), dtype=torch.float32)
    assert torch.equal(noise(11, 3, 2, (2, 3, 4), state), expected)


def test_noise_levels():
    """semantics: Noise levels."""
    for steps, shift in ((4, 5.0), (3, 1.0), (1, 8.0)):
        expected = [shift * (1 - j / steps) / (1 + (shift - 1) * (1 - j / steps)) for j in range(steps)]
        assert list(Schedule.shifted(steps, shift).sigmas) == pytest.approx(expected, abs=1e-12)
    assert Schedule.from_sigmas([1.0, 0.5, 0.0]).sigmas == (1.0, 0.5)


def test_a_chunk_is_its_passes_in_their_order():
    """semantics: A chunk. semantics: What a pass sees."""
    model, _, chunks = rolled(AnchorAdaptive(1), 6)
    tokens, sigmas = 6, Schedule.shifted(2, 5.0).sigmas
    assert len(model.passes) == 2 * 3
    for k, chunk in enumerate(chunks):
        (first, t0, sees), (second, t1, _), (clean, t2, clean_sees) = model.passes[3 * k : 3 * k + 3]
        assert (t0, t1, t2) == (1000 * sigmas[0], 1000 * sigmas[1], 0.0)
        shape, frames = (1, model.geometry.channels), (4, 6)
        drawn = [noise(11, k, j, (*shape, 1, *frames), True) for j in (0, 1)]
        content = [noise(11, k, j, (*shape, 3, *frames)) for j in (0, 1)]
        assert torch.equal(first, torch.cat([drawn[0], content[0]], 2))
        x0 = (second - sigmas[1] * torch.cat([drawn[1], content[1]], 2)) / (1 - sigmas[1])
        assert torch.isfinite(x0).all() and not torch.equal(second, first)
        assert torch.equal(clean[:, :, 1:], chunk.latents)
        # state and content of this chunk; from the second on, the old state and a window of three
        assert sees == clean_sees == tokens * (4 if k == 0 else 8)


def test_positions():
    """semantics: Positions."""
    numbers = dict(anchor_capacity=3, window_capacity=6, state_frames=1)
    fixed = Layout("fixed", **numbers, anchor_present=2, window_present=4, first_frame=20)
    assert [fixed.anchor(i, 99) for i in (0, 1)] == [0, 1]
    assert [fixed.window(f) for f in (16, 17, 18, 19)] == [5, 6, 7, 8]
    assert fixed.current(3) == [0, 9, 10, 11]
    packed = Layout("packed", **numbers, anchor_present=2, window_present=4, first_frame=20)
    assert [packed.window(f) for f in (16, 19)] == [2, 5] and packed.current(3) == [0, 6, 7, 8]
    empty = Layout("packed", **numbers, anchor_present=0, window_present=0, first_frame=0)
    assert empty.current(3) == [0, 1, 2, 3]
    absolute = Layout("absolute", 3, 6, 0, 2, 4, 20)
    assert (absolute.anchor(1, 7), absolute.window(17), absolute.current(3)) == (7, 17, [20, 21, 22])
    after = Layout("packed", **numbers, anchor_present=2, window_present=4, first_frame=20, state_after_past=True)
    assert after.current(3) == [6, 7, 8, 9]


@pytest.mark.parametrize(("given", "passes"), [(1, [1]), (3, [3]), (7, [3, 3, 1])])
def test_given_frames(given, passes):
    """semantics: Given frames."""
    model = Recorder()
    spec = RolloutSpec(model.geometry, 1, 4, 6, 3, 6, AnchorAdaptive(2), "packed", torch.float32)
    latents = torch.randn(1, model.geometry.channels, given, 4, 6, generator=torch.Generator().manual_seed(1))
    rollout = Rollout(model, spec, Settings(11, Schedule.shifted(1, 5.0)))
    chunks = list(rollout.chunks(given + 3, latents))
    at = 0
    for (x, timestep, _), frames in zip(model.passes, passes, strict=False):
        content = latents[:, :, at : at + frames]
        assert timestep == 0 and torch.equal(x, torch.cat([content[:, :, -1:]] * 2 + [content], 2))
        at += frames
    assert torch.equal(torch.cat([c.latents for c in chunks], 2)[:, :, :given], latents)
    # they do not count in k: the first generated chunk has the noise of chunk 0
    assert torch.equal(model.passes[len(passes)][0][:, :, 2:], noise(11, 0, 0, (1, model.geometry.channels, 3, 4, 6)))


def test_a_soft_change_has_the_shares_that_the_page_says():
    """semantics: A change of the prompt."""
    old, new = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    plan = PromptPlan([PromptChange(0, old), PromptChange(6, new, "soft", 3)], 3)
    shares = [float(plan.context(frame).mean()) for frame in range(0, 21, 3)]
    assert shares == pytest.approx([0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1])


def test_restarts():
    """semantics: Restarts."""
    spec = RolloutSpec(
        TinyModel().geometry,
        1,
        4,
        6,
        3,
        3,
        AnchorStatic(1),
        "packed",
        torch.float32,
        restart_frames=9,
        overlap_frames=3,
    )
    starts = [f for f in range(1, 40) if spec.clip(f) != spec.clip(f - 1)]
    assert starts == [9, 15, 21, 27, 33, 39]


def test_the_ridges():
    """semantics: Absorption: the solve."""
    from adastate_core.absorption.settings import AbsorptionSettings

    assert sorted(AbsorptionSettings().ridges(4)) == [0.3, 1, 3, 10, math.inf]
    assert sorted(AbsorptionSettings().ridges(3)) == [1, math.inf]
