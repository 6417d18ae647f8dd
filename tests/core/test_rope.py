"""The one door to rotation: complex and real tables against rotation by float64 sines and cosines, a pair of channels at a time."""

from __future__ import annotations

import math

import pytest
import torch

from adastate_core.rope import Rope, Turn, space_bytes

SIZES = [(12, 2, 3), (14, 3, 2), (128, 4, 5)]
NEAR = dict(atol=2e-6, rtol=2e-6)


def rotated(x: torch.Tensor, places: list[tuple[float, float, float]]) -> torch.Tensor:
    """x [B, N, heads, d] float64, token i turned by its (time, height, width) in `places`."""
    d = x.shape[-1]
    side = 2 * (d // 6)
    out = torch.empty_like(x)
    for i, place in enumerate(places):
        channel = 0
        for position, width in zip(place, (d - 2 * side, side, side), strict=True):
            for j in range(width // 2):
                angle = position * 10000.0 ** (-2 * j / width)
                a, b = x[:, i, :, channel], x[:, i, :, channel + 1]
                out[:, i, :, channel] = a * math.cos(angle) - b * math.sin(angle)
                out[:, i, :, channel + 1] = a * math.sin(angle) + b * math.cos(angle)
                channel += 2
    return out


def places_of(positions, rows: int, columns: int, sign: int = 1) -> list[tuple[float, float, float]]:
    """Those of every token of frames at `positions` (None: raw)."""
    return [
        (0, 0, 0) if t is None else (sign * t, sign * y, sign * x)
        for t in positions
        for y in range(rows)
        for x in range(columns)
    ]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("head_dim", "rows", "columns"), SIZES)
def test_a_turn_is_the_slow_rotation(head_dim, rows, columns, real):
    """From raw, from other positions, back to raw, and frames that stay; far frames too."""
    rope = Rope(head_dim, rows, columns, real_pairs=real)
    came, to = [None, 3, 7, 5, None, 4000], [2, 0, None, 5, None, 4001]
    x = draw(2, len(to) * rows * columns, 2, head_dim)
    expected = rotated(x.double(), places_of(came, rows, columns, -1))
    expected = rotated(expected, places_of(to, rows, columns))
    turn = rope.turn(came, to)
    torch.testing.assert_close(rope.rotate(x, turn).double(), expected, **NEAR)
    raw = rope.rotate(x, rope.turn(None, [1.0] * len(to)))
    torch.testing.assert_close(raw.double(), rotated(x.double(), places_of([1] * len(to), rows, columns)), **NEAR)
    some = slice(2 * rows * columns, 5 * rows * columns)
    assert torch.equal(rope.rotate(x[:, some], turn.frames(2, 5)), rope.rotate(x, turn)[:, some])
    parts = Turn.joined([rope.turn([a], [b]) for a, b in zip(came, to, strict=True)])
    torch.testing.assert_close(rope.rotate(x, parts), rope.rotate(x, turn), **NEAR)
    assert torch.equal(rope.rotate(x, rope.turn([None] * len(to), [None] * len(to))), x)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("head_dim", "rows", "columns"), SIZES)
def test_single_tokens_turn_as_in_their_frames(head_dim, rows, columns, real):
    rope = Rope(head_dim, rows, columns, real_pairs=real)
    generator = torch.Generator().manual_seed(2)
    positions, count = range(6, -30, -1), 9
    which = torch.randint(0, len(positions), (2, count), generator=generator)
    tokens = torch.randint(0, rows * columns, (2, count), generator=generator)
    x = draw(2, count, 2, head_dim)
    turned = rope.rotate(x, rope.turn_tokens(positions, which, tokens)).double()
    for item in range(2):
        places = [
            (positions[w], t // columns, t % columns)
            for w, t in zip(which[item].tolist(), tokens[item].tolist(), strict=True)
        ]
        expected = rotated(x[item : item + 1].double(), places)
        torch.testing.assert_close(turned[item : item + 1], expected, **NEAR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_float32_and_rounded_once(dtype):
    """As complex numbers and as real pairs: at most one bit of the last place apart, and both the rounded exact product."""
    x = draw(1, 2 * 20, 2, 128).to(dtype)
    expected = rotated(x.double(), places_of([300, 301], 4, 5))
    for real in (False, True):
        rope = Rope(128, 4, 5, real_pairs=real)
        turned = rope.rotate(x, rope.turn(None, [300, 301]))
        assert turned.dtype == dtype
        assert float((turned.double() - expected).abs().max()) <= 0.51 * torch.finfo(dtype).eps * 4


def test_real_pairs_hold_no_complex_number():
    rope = Rope(12, 2, 3, real_pairs=True)
    turns = [rope.turn([1, None], [2, 3]), rope.turn_tokens([5.0], torch.zeros(3, dtype=torch.int64), torch.arange(3))]
    assert all(part.dtype == torch.float32 for turn in turns for part in turn.parts)


@pytest.mark.parametrize("real", [False, True])
def test_gradients_are_turned_back(real):
    """The trainers differentiate through it: the gradient is the incoming one, turned the other way."""
    rope = Rope(12, 2, 3, real_pairs=real)
    x, incoming = draw(1, 6, 2, 12).requires_grad_(), draw(1, 6, 2, 12)
    rope.rotate(x, rope.turn(None, [9])).backward(incoming)
    expected = rotated(incoming.double(), places_of([9], 2, 3, -1))
    torch.testing.assert_close(x.grad.double(), expected, **NEAR)


@pytest.mark.parametrize("real", [False, True])
def test_kept_tables_stay_within_their_bytes_and_those_in_use_stay(real):
    rope = Rope(12, 2, 3, real_pairs=real, most_bytes=0)
    rope.most_bytes = rope.bytes_of(10)
    kept = rope.turn(None, [1, 2])
    assert rope.bytes_of(2) == sum(part.nbytes for part in kept.parts) == 2 * 6 * 12 * (8 if real else 4)
    for frame in range(100):
        rope.turn(None, [frame])
        rope.turn([frame], [frame + 1])
        rope.turn_tokens([float(frame)], torch.zeros(3, dtype=torch.int64), torch.arange(3))
        assert rope.turn(None, [1, 2]).parts[0] is kept.parts[0]
        held = sum(part.nbytes for parts in rope._kept.values() for part in parts)
        assert held <= rope.most_bytes and rope.nbytes == held + space_bytes(12, 6, real)
    large = rope.turn(None, range(11))
    assert large.parts[0].shape[0] == 11 * 6 and rope.turn(None, range(11)).parts[0] is not large.parts[0]
    assert torch.equal(large.parts[0], rope.turn(None, range(11)).parts[0]) and rope.nbytes <= rope.most_bytes + held


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("head_dim", "rows", "columns"), [*SIZES, (128, 30, 52)])
def test_a_table_put_together_has_the_bits_of_one_that_is_computed_whole(head_dim, rows, columns, real):
    """Time apart from height and width, frame by frame, against every token's own angles."""
    rope, to = Rope(head_dim, rows, columns, real_pairs=real), [2, None, 0, 17, 4001, 300.5]
    space, d = rope._space, head_dim - 4 * (head_dim // 6)
    time = torch.tensor([p or 0 for p in to]).double()[:, None] * 10000.0 ** -(torch.arange(0, d, 2).double() / d)
    angles = torch.cat([torch.cat([one.expand(len(space), -1), space], -1) for one in time])
    units = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    units[len(space) : 2 * len(space)] = 1
    found = rope.turn(None, to).parts
    if not real:
        assert torch.equal(found[0][:, 0], units)
        return
    assert torch.equal(found[0][:, 0, ::2], units.real) and torch.equal(found[0][:, 0, 1::2], units.real)
    assert torch.equal(found[1][:, 0, ::2], -units.imag) and torch.equal(found[1][:, 0, 1::2], units.imag)


def test_every_frame_comes_from_somewhere():
    with pytest.raises(ValueError, match="1 positions to come from and 2 to go to"):
        Rope(12, 2, 3).turn([None], [1, 2])
