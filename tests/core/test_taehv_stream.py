"""The tiny VAE's stream against a plain loop over all frames: any split, snapshots, failures, constant memory."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adastate_core.decode.tiny_vae import TaehvStream, cache_bytes
from adastate_core.decode.wan_vae import NonFinitePicturesError

WIDTHS = (6, 5, 4, 4)
ROWS, COLUMNS = 3, 2


class Squash(nn.Module):
    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """A layer that is called with the frame before, as TAEHV's memory blocks are."""

    def __init__(self, n: int, act: nn.Module) -> None:
        super().__init__()
        convs = (nn.Conv2d(2 * n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1))
        self.conv = nn.Sequential(convs[0], act, convs[1], act, convs[2])
        self.skip, self.act = nn.Identity(), act

    def forward(self, x, past):
        return self.act(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class Grow(nn.Module):
    """One frame to `stride` frames."""

    def __init__(self, n: int, stride: int) -> None:
        super().__init__()
        self.stride, self.conv = stride, nn.Conv2d(n, n * stride, 1, bias=False)

    def forward(self, x):
        return self.conv(x).reshape(-1, *x.shape[1:])


@pytest.fixture(scope="module")
def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    act = nn.ReLU(inplace=True)
    layers: list[nn.Module] = [Squash(), nn.Conv2d(16, WIDTHS[0], 3, padding=1), act]
    for width, following, stride in zip(WIDTHS, WIDTHS[1:], (1, 2, 2), strict=False):
        layers += [*(Block(width, act) for _ in range(3)), nn.Upsample(scale_factor=2), Grow(width, stride)]
        layers += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
    layers += [act, nn.Conv2d(WIDTHS[-1], 3, 3, padding=1)]
    made = nn.Sequential(*layers).requires_grad_(False)
    for parameter in made.parameters():
        parameter.mul_(2.0)
    return made


def slow_decode(decoder: nn.Sequential, latents: torch.Tensor) -> torch.Tensor:
    """Item by item, layer by layer, frame by frame over the whole clip; the first 3 pictures fall away."""
    videos = []
    for item in latents:
        frames = [item[:, i][None] for i in range(item.shape[1])]
        for layer in decoder:
            if isinstance(layer, Block):
                before = [torch.zeros_like(frames[0]), *frames[:-1]]
                frames = [layer(x.clone(), past) for x, past in zip(frames, before, strict=True)]
            elif isinstance(layer, Grow):
                frames = [part for x in frames for part in layer.conv(x).chunk(layer.stride, dim=1)]
            else:
                frames = [layer(x.clone()) for x in frames]
        videos.append(torch.cat(frames[3:]).clamp(0, 1).permute(0, 2, 3, 1))
    return torch.stack(videos)


def clip(frames: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def random_split(rng: random.Random, total: int) -> list[int]:
    parts = []
    while sum(parts) < total:
        parts.append(rng.randint(1, min(4, total - sum(parts))))
    return parts


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("frames_per_call", [1, 2, 5])
def test_any_split_is_the_whole_decode(decoder, batch, frames_per_call):
    rng, z = random.Random(batch), clip(11, batch)
    whole = slow_decode(decoder, z)
    assert whole.shape == (batch, 41, 8 * ROWS, 8 * COLUMNS, 3)
    assert whole.min() == 0 and whole.max() == 1 and 0.05 < whole.mean() < 0.95
    for split in ([11], [1] * 11, *(random_split(rng, 11) for _ in range(6))):
        stream = TaehvStream(decoder, frames_per_call)
        parts = [stream.step(part) for part in z.split(split, dim=2)]
        assert [p.shape[1] for p in parts] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(split)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
        assert stream.latents_seen == 11


def test_a_latent_reaches_pictures_far_later(decoder):
    """So that a memory that is dropped or mixed up cannot pass the tests above."""
    z = clip(6)
    other = z.clone()
    other[:, :, 0] += 1
    a, b = slow_decode(decoder, z), slow_decode(decoder, other)
    assert not torch.allclose(a[:, 9:13], b[:, 9:13], atol=1e-3)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_stream_goes_on_from_a_file(decoder, tmp_path, cut):
    z = clip(7, batch=2)
    first, second = TaehvStream(decoder), TaehvStream(decoder)
    head = first.step(z[:, :, :cut])
    saved = first.snapshot()
    first.step(z[:, :, cut:])
    tensors = {name: value for name, value in saved.items() if torch.is_tensor(value)}
    save_file(tensors, tmp_path / "a.safetensors")
    numbers = json.loads(json.dumps({name: value for name, value in saved.items() if name not in tensors}))
    second.restore(numbers | load_file(tmp_path / "a.safetensors"), "cpu", torch.float32)
    both = torch.cat([head, second.step(z[:, :, cut:])], 1)
    torch.testing.assert_close(both, slow_decode(decoder, z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["the last layer", "a memory block"])
def test_what_is_not_finite_is_never_shown_nor_carried(decoder, where, by):
    """Infinity too: it would be cut off to white or black."""
    z, stream = clip(6), TaehvStream(decoder)
    head = stream.step(z[:, :, :2])
    before = stream.snapshot()
    layer = decoder[-1] if where == "the last layer" else next(block for block in decoder if isinstance(block, Block))

    def spoil(_module, _inputs, output):
        output = output.clone()
        output.view(-1)[-1] = by
        return output

    hook = layer.register_forward_hook(spoil)
    with pytest.raises(
        NonFinitePicturesError, match="in float32, gave NaN or infinite values for latent frames 2 to 3"
    ):
        stream.step(z[:, :, 2:4])
    hook.remove()
    after = stream.snapshot()
    assert before.keys() == after.keys() and stream.latents_seen == 2
    assert all(torch.equal(before[n], after[n]) for n in before if torch.is_tensor(before[n]))
    both = torch.cat([head, stream.step(z[:, :, 2:])], 1)
    torch.testing.assert_close(both, slow_decode(decoder, z), atol=1e-5, rtol=1e-5)


def test_a_memory_that_is_not_finite_is_refused(decoder):
    stream = TaehvStream(decoder)
    stream.step(clip(2))
    saved = stream.snapshot()
    saved["taehv_memory_4"][0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="damaged"):
        stream.restore(saved, "cpu", torch.float32)


def test_an_empty_stream_can_be_saved(decoder):
    stream = TaehvStream(decoder)
    stream.step(clip(2))
    stream.restore(TaehvStream(decoder).snapshot(), "cpu", torch.float32)
    torch.testing.assert_close(stream.step(clip(3)), slow_decode(decoder, clip(3)), atol=1e-5, rtol=1e-5)


def test_rewinding_decodes_the_same_again(decoder):
    z, stream = clip(8), TaehvStream(decoder)
    stream.step(z[:, :, :3])
    mark = stream.mark()
    stream.step(clip(4, seed=9))
    stream.rewind(mark)
    again = stream.step(z[:, :, 3:])
    torch.testing.assert_close(again, slow_decode(decoder, z)[:, 9:], atol=1e-5, rtol=1e-5)


def test_a_decode_that_fails_leaves_the_stream_where_it_was(decoder, monkeypatch):
    z, stream = clip(6), TaehvStream(decoder)
    stream.step(z[:, :, :2])
    grow, calls = Grow.forward, []

    def fail(self, x):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return grow(self, x)

    monkeypatch.setattr(Grow, "forward", fail)
    with pytest.raises(MemoryError):
        stream.step(z[:, :, 2:])
    monkeypatch.undo()
    assert stream.latents_seen == 2
    torch.testing.assert_close(stream.step(z[:, :, 2:]), slow_decode(decoder, z)[:, 5:], atol=1e-5, rtol=1e-5)


def test_the_memory_does_not_grow_and_is_what_was_planned(decoder):
    stream, sizes = TaehvStream(decoder, 3), []
    for i in range(6):
        stream.step(clip(1 + i % 4, batch=2))
        sizes.append((stream.nbytes, sum(t.untyped_storage().nbytes() for t in stream.mark()[0])))
    values = 3 * (WIDTHS[0] + 4 * WIDTHS[1] + 16 * WIDTHS[2])
    planned = cache_bytes(decoder, ROWS, COLUMNS, 2, torch.float32)
    assert planned == values * ROWS * COLUMNS * 2 * 4
    assert set(sizes) == {(planned, planned)}


@pytest.mark.parametrize(
    "damage",
    [
        {"taehv_memory_0": None},
        {"taehv_memory_3": torch.zeros(2, 2)},
        {"taehv_memory_3": torch.zeros(1, WIDTHS[0], 2 * ROWS, 2 * COLUMNS)},
        {"taehv_memory_3": torch.zeros(1, WIDTHS[1], 2 * ROWS, 2 * COLUMNS, dtype=torch.int64)},
        {"taehv_memory_3": torch.zeros(1, WIDTHS[1], 2 * ROWS + 2, 2 * COLUMNS)},
        {"taehv_memory_3": torch.zeros(2, WIDTHS[1], 2 * ROWS, 2 * COLUMNS)},
    ],
    ids=["missing", "ndim", "channels", "integers", "size", "batch"],
)
def test_damaged_memories_are_refused(decoder, damage):
    stream = TaehvStream(decoder)
    stream.step(clip(2))
    saved = stream.snapshot()
    stream.restore(saved, "cpu", torch.float32)
    with pytest.raises(ValueError, match="memory is damaged"):
        stream.restore(saved | damage, "cpu", torch.float32)


@pytest.mark.parametrize("saved", [{}, {"vae_latents_seen": 3, "vae_markers": []}], ids=["none", "full"])
def test_what_is_not_its_own_is_refused(decoder, saved):
    with pytest.raises(ValueError, match="holds no tiny VAE's memory"):
        TaehvStream(decoder).restore(saved, "cpu", torch.float32)


def test_impossible_arguments_are_refused(decoder):
    with pytest.raises(ValueError, match="frames_per_call is 0"):
        TaehvStream(decoder, 0)
    with pytest.raises(ValueError, match="without memory blocks"):
        TaehvStream(nn.Sequential(nn.Conv2d(16, 3, 1)))
