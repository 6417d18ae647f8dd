"""Pictures on their way to the files: enlarged, with in-betweens across chunks, however the video is cut and whatever fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from live_bytes import LiveBytes
from tiny_stream import BATCH, HEIGHT, WIDTH, ListSink, TinyDecoder

from adastate_core.files.header_check import Damage, Fields, Tensors
from adastate_core.states.enlarged_check import check_enlarged
from adastate_core.video.decoded_stream import VideoStream
from adastate_core.video.enlarging import HELD, MODELS, MULTIPLIER, SINGLY, SIZE, TILE, FilePictures, file_frames
from adastate_core.video.picture_forms import in_form


class Twice:
    """Pictures with every pixel doubled, and in-betweens by weight. `fails`: enlarging that picture, from 0, raises."""

    def __init__(self, multiplier: int, fails: int = -1) -> None:
        self.multiplier, self.fails, self.calls, self.rests = multiplier, fails, 0, 0

    def size(self, width, height):
        return 2 * width, 2 * height

    def enlarge(self, picture):
        self.calls += 1
        if self.calls - 1 == self.fails:
            raise MemoryError
        return picture.repeat_interleave(2, 0).repeat_interleave(2, 1)

    def between(self, before, after):
        for step in range(1, self.multiplier):
            yield torch.lerp(before, after, step / self.multiplier)

    def rest(self):
        self.rests += 1

    def snapshot(self):
        return {TILE: 7}

    def restore(self, saved):
        assert saved[TILE] == 7


def latents(frames: int) -> torch.Tensor:
    return torch.randn(BATCH, 3, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def slow(decoded: torch.Tensor, multiplier: int) -> torch.Tensor:
    """The same of one whole video [t, H, W, 3]."""
    large = torch.kron(decoded.movedim(-1, 1), torch.ones(2, 2)).movedim(1, -1)
    made = [large[:1]]
    for i in range(1, len(large)):
        made += [(1 - k / multiplier) * large[i - 1] + k / multiplier * large[i] for k in range(1, multiplier)]
        made.append(large[i])
    return torch.cat([picture.reshape(1, *large.shape[1:]) for picture in made])


@pytest.mark.parametrize("multiplier", [1, 2, 5])
@pytest.mark.parametrize("split", [[6], [1] * 6, [3, 1, 2]], ids=str)
def test_any_cut_gives_the_frames_of_the_whole_video(split, multiplier):
    z, sinks = latents(6), [ListSink("float"), ListSink("float")]
    stream = VideoStream(TinyDecoder(), sinks, enlarged=FilePictures(Twice(multiplier)))
    shown = [stream.step(part).wait().clone() for part in z.split(split, 2)]
    stream.drain()
    decoded = TinyDecoder().step(z, "float")
    assert torch.equal(torch.cat(shown, 1), in_form(decoded, "bytes"))
    assert stream.frames == file_frames(21, multiplier) == 20 * multiplier + 1
    assert stream.enlarged.enlarger.rests == len(split)
    for sink, pictures in zip(sinks, decoded, strict=True):
        torch.testing.assert_close(sink.pictures, slow(pictures, multiplier), rtol=0, atol=3e-7)
    kept = stream.snapshot()
    assert (kept["frames_written"], kept["file_frames"], kept[TILE]) == (21, [stream.frames] * 2, 7)
    assert torch.equal(kept[HELD], decoded[:, -1]) if multiplier > 1 else HELD not in kept
    stream.close()


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_stream_that_goes_on_makes_the_in_betweens_of_the_border(cut):
    z, whole, first, rest = latents(6), *([ListSink(), ListSink()] for _ in range(3))
    streams = [VideoStream(TinyDecoder(), sinks, enlarged=FilePictures(Twice(3))) for sinks in (whole, first)]
    streams[0].step(z[:, :, :cut])
    streams[0].step(z[:, :, cut:])
    streams[1].step(z[:, :, :cut])
    saved = streams[1].snapshot()
    decoder, enlarged = TinyDecoder(), FilePictures(Twice(3))
    decoder.restore(saved)
    enlarged.restore(saved)
    assert enlarged.looks_back
    third = VideoStream(decoder, rest, frames_before=saved["frames_written"], enlarged=enlarged)
    third.step(z[:, :, cut:])
    kept = third.snapshot()
    for stream in (*streams, third):
        stream.close()
    for one, two, three in zip(whole, first, rest, strict=True):
        assert torch.equal(one.pictures, torch.cat([two.pictures, three.pictures]))
    assert kept["frames_written"] == 21 and kept["file_frames"] == [61 - file_frames(4 * cut - 3, 3)] * 2
    alone = FilePictures(Twice(3))  # from a state that holds no picture: the first new frame comes first
    assert not alone.looks_back and alone.step(TinyDecoder().step(z[:, :, :2], "float"), "bytes").shape[1] == 13


def test_memory_does_not_grow_with_the_length_and_is_a_chunk_and_a_few_pictures():
    enlarged, decoder, peaks = FilePictures(Twice(3)), TinyDecoder(), []
    picture, chunk = 2 * HEIGHT * 2 * WIDTH * 3 * 4, BATCH * 8 * 3 * 2 * HEIGHT * 2 * WIDTH * 3
    for _ in range(12):
        decoded = decoder.step(latents(2), "float")
        with LiveBytes() as live:
            enlarged.step(decoded, "bytes")
        peaks.append(live.peak["cpu"])
    assert len(set(peaks[1:])) == 1
    # beside the chunk in bytes: each item's last picture, what one is made of, an in-between and its form
    assert chunk < peaks[-1] < chunk + (BATCH + 5) * picture


def test_what_fails_in_a_chunk_leaves_the_stream_before_it():
    z, sinks, plain = latents(5), [ListSink(), ListSink()], [ListSink(), ListSink()]
    stream = VideoStream(TinyDecoder(), sinks, enlarged=FilePictures(Twice(2, fails=12)))
    other = VideoStream(TinyDecoder(), plain, enlarged=FilePictures(Twice(2)))
    stream.step(z[:, :, :2])
    with pytest.raises(MemoryError):  # at the third picture of the chunk
        stream.step(z[:, :, 2:])
    assert stream.enlarged.enlarger.rests == 2
    stream.step(z[:, :, 2:])
    for part in z.split([2, 3], 2):
        other.step(part)
    for each in (stream, other):
        each.close()
    assert torch.equal(sinks[0].pictures, plain[0].pictures) and torch.equal(sinks[1].pictures, plain[1].pictures)


def test_chunks_that_are_never_written_are_taken_back():
    z = latents(5)
    sinks = [ListSink(), ListSink(fails=1, error=OSError("full"))]
    stream = VideoStream(TinyDecoder(), sinks, enlarged=FilePictures(Twice(2)))
    stream.step(z[:, :, :2])
    stream.drain()
    held = stream.snapshot()[HELD]
    stream.step(z[:, :, 2:4])
    with pytest.raises(OSError, match="full"):
        stream.drain()
    assert stream.take_back() == 1
    kept = stream.enlarged.snapshot()
    assert torch.equal(kept[HELD], held) and stream.decoder.seen == 2
    stream.close()


GOOD = {SIZE: [32, 64], MULTIPLIER: 2, MODELS: ["Net 2x 0123", ""], TILE: 256, SINGLY: True}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({SIZE: [32]}, "enlarged_size is \\[32\\], not a width and a height"),
        ({SIZE: [0, 32]}, "enlarged_size\\[0\\] is 0"),
        ({MULTIPLIER: 0}, "enlarged_multiplier is 0"),
        ({MULTIPLIER: 1}, "no in-betweens to make from it"),
        ({MODELS: ["one"]}, "enlarged_models are"),
        ({MODELS: [1, 2]}, "enlarged_models are"),
        ({TILE: "small"}, "enlarged_tile is small"),
        ({SINGLY: 1}, "enlarged_singly is 1"),
        ({HELD: torch.zeros(1, 16, 16, 1)}, "enlarged_held is float32"),
        ({HELD: torch.full((1, 16, 16, 3), float("nan"))}, "enlarged_held holds NaN"),
    ],
    ids=str,
)
def test_what_a_damaged_state_says_of_its_files_is_refused(damage, words):
    space = SimpleNamespace(stride=8)
    spec = SimpleNamespace(batch=1, height=2, width=2, geometry=SimpleNamespace(space=space))
    held = torch.zeros(1, 16, 16, 3)
    for values in ({}, GOOD):
        check_enlarged(Fields(values, "stream"), Tensors({f"stream.{HELD}": held} if values else {}), spec)
    with pytest.raises(Damage, match=words):
        tensors = {f"stream.{HELD}": damage.get(HELD, held)}
        check_enlarged(Fields(GOOD | damage, "stream"), Tensors(tensors), spec)
