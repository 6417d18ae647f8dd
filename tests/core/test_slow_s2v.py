"""What the slow S2V loops are trusted for, apart from their likeness to the host's model (tests/host/test_slow_s2v.py)."""

from __future__ import annotations

import pytest
import torch
from slow_liveavatar import DROPPED, PADDED, LiveAvatar, Plain, levels_of
from slow_s2v import SlowS2V, at_pictures, spread
from tiny_s2v import SIZES, features, tiny_s2v

H = W = 8


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(kind=LiveAvatar, size=(128, 1), seconds=1.0, state=None, **numbers):
    model = SlowS2V(tiny_s2v(*size) if state is None else state)
    given = {"heard": model.folded(features(seconds)), "reference": drawn(3, 1, 16, 1, H, W)}
    return kind(model, drawn(2, 1, 5, 4096), **({"seed": 5, "h": H, "w": W} | given | numbers))


def test_the_levels_are_the_published_schedulers():
    """diffusers 0.35.2, FlowMatchEulerDiscreteScheduler(1000, shift=3), four steps."""
    assert levels_of(4) == pytest.approx([1.0, 0.857692322, 0.602150574, 0.008928572, 0.0], abs=1e-7)


def test_copies_in_front_are_the_first_for_ever():
    """What the encoder hears of 73 copies in front, or of 9, is the same: its own edge stands for as many as one likes."""
    model = SlowS2V(tiny_s2v(128, 1))
    own = at_pictures(model.folded(features(1.0)), 25, 12)

    def after(copies):
        return model.hears(torch.cat([own[:1].expand(copies, -1), own]))

    (few, few_whole), (many, many_whole) = after(9), after(PADDED)
    assert torch.allclose(few[3:], many[DROPPED:], atol=1e-12) and torch.allclose(
        few_whole[3:], many_whole[DROPPED:], atol=1e-12
    )


def test_rows_of_larger_patches_are_cut_to_whole_numbers():
    assert (spread(12, 6), spread(12, 3), spread(4, 1)) == ([0, 2, 4, 6, 8, 11], [0, 5, 11], [0])


def test_a_rollout_to_be_read_piecewise_is_the_whole():
    """The loop goes on from where it is, and a longer one begins with a shorter one."""
    piecewise, whole = loop(), loop()
    piecewise.roll(2)
    assert torch.equal(piecewise.roll(4), whole.roll(6))


def test_every_weight_of_the_tiny_file_shows_in_a_rollout():
    """So a pack that leaves one out, or takes another for it, differs from the loop."""
    state = tiny_s2v(128, 1)
    others = [f"injector{part}.{i}." for i in range(1, 12) for part in ("", "_adain_layers")]
    # a pose is never said, but that there is none; eleven injectors belong to blocks that are not there
    used = [name for name in state if name != "cond_encoder.weight" and not any(other in name for other in others)]
    plain = loop(steps=1).roll(1)
    changes = {name: loop(state=state | {name: 1.5 * state[name] + 0.05}, steps=1).roll(1) - plain for name in used}
    assert len(used) == 74 and [name for name, change in changes.items() if float(change.abs().max()) < 1e-4] == []


# a mistake, and from which chunk on it shows
MISTAKES = {
    "true_context": 1, "host_aligned": 0, "endless": 4, "still": 1, "thirty_away": 1, "motion_rolls": 1, "host_motion_times": 0,
    "one_history": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(name):
    right, wrong = loop(size=SIZES["one block"]).roll(6), loop(size=SIZES["one block"], **{name: True}).roll(6)
    differ = [float((a - b).abs().max()) > 1e-3 for a, b in zip(right.split(3, 2), wrong.split(3, 2), strict=True)]
    assert differ.index(True) == MISTAKES[name] and differ[-1]


def test_sound_and_picture_show_in_the_plain_way():
    whole = loop(Plain).roll(6, [1.0, 0.8], W=3)["latents"]
    for without in ("heard", "reference"):
        assert float((loop(Plain, **{without: None}).roll(6, [1.0, 0.8], W=3)["latents"] - whole).abs().max()) > 1e-2
