"""Frames that are written beside what makes them: the same pictures, what fails, what is interrupted, and the thread's end."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from tiny_stream import BATCH, ListSink, TinyDecoder, chunks, decoded, writers

from adastate_core.video.decoded_stream import MARKS, VideoStream, old_caches
from adastate_core.video.frame_writer import NAME, FrameWriter
from adastate_core.video.picture_forms import deepest, in_form, to_bytes
from adastate_core.video.sink import VideoSink
from adastate_core.video.writing_thread import WritingThread

ROOT = Path(__file__).resolve().parents[2]
FAILURES = [OSError(28, "No space left on device"), MemoryError("no room"), KeyboardInterrupt("ended")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not writers()
    yield
    assert not writers()


def bytes_of(pictures: torch.Tensor) -> torch.Tensor:
    """By numpy: float32 times 255, cut off."""
    return torch.from_numpy(numpy.trunc(pictures.numpy() * numpy.float32(255)).clip(0, 255).astype("uint8"))


def edges() -> torch.Tensor:
    """Next to every byte's edge: the float32 of k / 255 and its neighbours, between which nothing can change, since a larger
    value gives no smaller product; and values between."""
    at = (numpy.arange(256) / 255).astype("float32")
    near = [at]
    for way in (-numpy.inf, numpy.inf):
        one = at
        for _ in range(4):
            one = numpy.nextafter(one, numpy.float32(way))
            near.append(one)
    values = torch.from_numpy(numpy.concatenate(near)).clamp(0, 1)
    return torch.cat([values, torch.rand(100_000, generator=torch.Generator().manual_seed(1))])


def test_integers_give_the_bytes_that_floats_give():
    x = edges()
    integers = in_form(x, "integers")
    assert integers.dtype == torch.uint16
    assert torch.equal(to_bytes(integers), bytes_of(x)) and torch.equal(to_bytes(x), bytes_of(x))
    assert (integers.double() - x.double() * 65535).abs().max() <= 1.01
    assert torch.equal(to_bytes(to_bytes(x)), to_bytes(x))


def test_the_deepest_form_is_what_every_sink_can_be_given_from():
    assert deepest([]) == deepest(["bytes"]) == "bytes"
    assert deepest(["bytes", "integers"]) == "integers" and deepest(["integers", "float", "bytes"]) == "float"
    with pytest.raises(ValueError, match="a sink takes 'half'; a sink may take bytes, integers, float"):
        deepest(["bytes", "half"])


@pytest.mark.parametrize(
    "takes", [("bytes", "bytes"), ("bytes", "integers"), ("integers", "float"), ("bytes", "float")]
)
def test_each_sink_gets_all_pictures_in_the_form_that_it_takes(takes):
    sinks, latents = [ListSink(form) for form in takes], chunks(7)
    stream = VideoStream(TinyDecoder(), sinks)
    for chunk in latents:
        stream.step(chunk)
    assert stream.close() == [] and stream.frames == 81 and [sink.ended for sink in sinks] == ["closed"] * 2
    whole = decoded(latents)
    for sink, item in zip(sinks, whole, strict=True):
        expected = bytes_of(item) if sink.takes == "bytes" else in_form(item, sink.takes)
        assert torch.equal(sink.pictures, expected)
        assert sink.threads == {NAME}


def test_a_file_is_the_bytes_that_writing_chunk_by_chunk_gives(tmp_path):
    pictures = [torch.rand(BATCH, t, 32, 48, 3, generator=torch.Generator().manual_seed(t)) for t in (9, 12, 12, 4)]
    with FrameWriter([VideoSink(tmp_path / f"{i}.mp4", 48, 32, 16) for i in range(BATCH)]) as writer:
        for part in pictures:
            writer.give(in_form(part, writer.takes))
    for i, sink in enumerate(writer.sinks):
        sink.close()
        with VideoSink(tmp_path / f"alone{i}.mp4", 48, 32, 16) as alone:
            for part in pictures:
                alone.write(bytes_of(part[i]))
        assert (tmp_path / f"{i}.mp4").read_bytes() == (tmp_path / f"alone{i}.mp4").read_bytes()


class Rollout:
    """What a stream's owner does: latents that could not be written are its own again, and it goes on from a state."""

    def __init__(self, latents: list[torch.Tensor], sinks, nbytes: int = 0) -> None:
        self.pending, self.given = list(latents), []
        self.stream = VideoStream(TinyDecoder(nbytes=nbytes), sinks)

    def run(self) -> None:
        try:
            while self.pending:
                latents = self.pending.pop(0)
                try:
                    self.stream.step(latents)
                except BaseException:
                    self.pending.insert(0, latents)
                    raise
                self.given.append(latents)
            self.stream.drain()
        except BaseException:
            self.take_back()
            raise
        finally:
            self.stream.close()

    def take_back(self) -> None:
        for _ in range(self.stream.take_back()):
            self.pending.insert(0, self.given.pop())


@pytest.mark.parametrize("nbytes", [0, MARKS + 1], ids=["small cache", "large cache"])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fails", range(6))
def test_what_fails_in_the_thread_is_told_and_loses_nothing(fails, error, nbytes):
    latents, sinks = chunks(6), [ListSink(), ListSink(fails=fails, error=error)]
    rollout = Rollout(latents, sinks, nbytes)
    with pytest.raises(type(error)) as caught:
        rollout.run()
    assert caught.value is error and len(rollout.given) == fails
    assert rollout.stream.frames == max(0, 12 * fails - 3) == len(sinks[1].chunks and sinks[1].pictures)
    assert rollout.stream.decoder.calls <= fails + 3
    state = rollout.stream.snapshot()
    assert state["frames_written"] == rollout.stream.frames and state["seen"] == 3 * fails
    rest = Rollout(rollout.pending, [ListSink(), ListSink()])
    rest.stream.decoder.restore(state)
    rest.run()
    written = torch.cat([*sinks[1].chunks, *rest.stream.sinks[1].chunks])
    assert torch.equal(written, bytes_of(decoded(latents)[1]))


def test_a_failure_is_told_by_the_next_chunk():
    sinks = [ListSink(), ListSink(fails=1, error=OSError(28, "full"))]
    rollout = Rollout(chunks(9), sinks)
    with pytest.raises(OSError, match="full"):
        rollout.run()
    assert rollout.stream.decoder.calls <= 4  # it fails while the third is decoded at the latest, and two may be behind
    assert rollout.stream.take_back() == 0
    rollout.stream.drain()


@pytest.mark.parametrize("behind", [1, 2])
def test_an_interrupt_with_chunks_under_way_writes_them(behind):
    latents, sinks = chunks(4), [ListSink(), ListSink()]
    stream = VideoStream(TinyDecoder(), sinks)
    stream.step(latents[0])
    stream.drain()
    sinks[0].gate.clear()
    for chunk in latents[1 : 1 + behind]:
        stream.step(chunk)
    assert stream.under_way == behind and stream.frames == 9
    threading.Timer(0.05, sinks[0].gate.set).start()
    stream.close()  # as whoever is interrupted finishes its files
    assert stream.under_way == 0 and stream.frames == 9 + 12 * behind and stream.take_back() == 0
    assert stream.snapshot()["seen"] == 3 * (1 + behind)
    assert torch.equal(sinks[1].pictures, bytes_of(decoded(latents[: 1 + behind])[1]))


@pytest.mark.parametrize(("nbytes", "most"), [(0, 2), (MARKS, 2), (MARKS + 1, 1)])
def test_no_more_than_two_chunks_are_under_way_and_one_beside_a_large_cache(nbytes, most):
    latents, sinks = chunks(5), [ListSink(), ListSink()]
    stream, decoder = VideoStream(TinyDecoder(nbytes=nbytes), sinks), TinyDecoder(nbytes=nbytes)
    stream.decoder = decoder
    sinks[0].gate.clear()
    done = threading.Event()
    other = threading.Thread(target=lambda: ([stream.step(chunk) for chunk in latents], done.set()))
    other.start()
    assert not done.wait(0.3)
    # a chunk is decoded while one is under way, where the decoder's cache is large while none is
    assert stream.under_way == decoder.calls == most
    sinks[0].gate.set()
    assert done.wait(20)
    other.join()
    stream.close()
    assert torch.equal(sinks[1].pictures, bytes_of(decoded(latents)[1]))


@pytest.mark.parametrize("nbytes", [MARKS, MARKS + 1])
def test_a_stream_keeps_no_more_old_caches_alive_than_it_says(nbytes):
    """Whatever it does: counted by the tensors of the decoder's memory while it decodes."""
    made, alive = [], []

    class Watched(TinyDecoder):
        def step(self, latents, takes):
            pictures = super().step(latents, takes)
            made.append(weakref.ref(self.memory))
            alive.append(sum(memory() is not None for memory in made))
            return pictures

    stream = VideoStream(Watched(nbytes=nbytes), [ListSink(), ListSink()])
    made.append(weakref.ref(stream.decoder.memory))
    for chunk in chunks(8):
        stream.step(chunk)
    stream.close()
    assert 1 < max(alive) <= 1 + old_caches(nbytes)


@pytest.mark.parametrize("waiting", [True, False])
def test_an_interrupt_while_pictures_are_given_leaves_them_out(monkeypatch, waiting):
    """Before they are taken they are never written; just after they may be, and do not count."""
    latents, sinks = chunks(2), [ListSink(), ListSink()]
    stream = VideoStream(TinyDecoder(), sinks)
    stream.step(latents[0])
    stream.drain()
    give = WritingThread.give

    def interrupted(self, item):
        if not waiting:
            give(self, item)
            self.wait(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(WritingThread, "give", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.step(latents[1])
    monkeypatch.undo()
    assert (stream.frames, stream.under_way, stream.snapshot()["seen"]) == (9, 0, 3)
    stream.close()
    assert len(sinks[0].chunks) == (1 if waiting else 2)


def test_a_chunk_that_cannot_be_decoded_leaves_those_under_way_alone(monkeypatch):
    latents, sinks = chunks(3), [ListSink(), ListSink()]
    stream = VideoStream(TinyDecoder(), sinks)
    sinks[0].gate.clear()
    stream.step(latents[0])
    whole = TinyDecoder.step
    monkeypatch.setattr(TinyDecoder, "step", lambda self, *given: (whole(self, *given), 1 / 0)[0])
    with pytest.raises(ZeroDivisionError):
        stream.step(latents[1])
    monkeypatch.undo()
    sinks[0].gate.set()
    assert stream.snapshot()["seen"] == 3 and stream.take_back() == 0 and stream.frames == 9
    for chunk in latents[1:]:
        stream.step(chunk)
    stream.close()
    assert torch.equal(sinks[0].pictures, bytes_of(decoded(latents)[0]))


def test_without_a_thread_frames_are_written_in_turn(monkeypatch, caplog):
    latents, sinks = chunks(4), [ListSink(), ListSink()]

    def refused(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    stream = VideoStream(TinyDecoder(), sinks)
    for i, chunk in enumerate(latents):
        stream.step(chunk)
        assert stream.under_way == 0 and len(sinks[1].chunks) == i + 1
    stream.close()
    assert torch.equal(sinks[1].pictures, bytes_of(decoded(latents)[1])) and sinks[1].threads == {"MainThread"}
    assert caplog.text.count("could not be started") == 1
    failing = Rollout(latents, [ListSink(), ListSink(fails=2, error=OSError(28, "full"))])
    with pytest.raises(OSError, match="full"):
        failing.run()
    assert len(failing.given) == 2 and failing.stream.frames == 21 and failing.stream.decoder.seen == 6


@pytest.mark.parametrize("started", [False, True])
def test_an_interrupt_as_the_thread_starts_leaves_the_chunk_out(monkeypatch, started):
    start, sinks, latents = threading.Thread.start, [ListSink(), ListSink()], chunks(2)

    def interrupted(thread):
        if started:
            start(thread)
        raise KeyboardInterrupt

    stream = VideoStream(TinyDecoder(), sinks)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.step(latents[0])
    monkeypatch.undo()
    assert (stream.frames, stream.under_way, stream.decoder.seen) == (0, 0, 0)
    stream.close()


def test_there_is_one_thread_a_stream_no_daemon_and_none_before_the_first_chunk_or_after_the_end():
    streams = [VideoStream(TinyDecoder(), [ListSink(), ListSink()]) for _ in range(3)]
    assert not writers()
    for stream in streams:
        for chunk in chunks(3):
            stream.step(chunk)
    assert len(writers()) == 3 and not any(thread.daemon for thread in writers())
    for left, stream in zip((2, 1, 0), streams, strict=True):
        stream.close()
        assert len(writers()) == left
        stream.close()


def test_a_failure_ends_the_thread_and_frees_the_pictures_behind_it():
    writer = FrameWriter([ListSink(fails=0, error=OSError(5, "broken"))])
    with pytest.raises(OSError, match="broken"):
        for _ in range(5):
            writer.give(torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8))
    writer.end()
    with pytest.raises(OSError, match="broken"):
        writer.wait()
    assert len(writer.under_way) <= 2 and writer.failed


ABANDONED = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from adastate_core.video.writing_thread import WritingThread
done = []
def work(item):
    done.append(item)
    print(item, flush=True)
def owner():
    thread = WritingThread(work, "abandoned")
    thread.give("written")
    keep.append(thread)
    threading.Event().wait()
keep = []
threading.Thread(target=owner, daemon=True).start()
while not done:
    pass
"""


def test_a_process_whose_owner_never_ends_the_thread_still_ends():
    """As a server that is told to go while a prompt's thread, which is a daemon, rolls out."""
    result = subprocess.run([sys.executable, "-c", ABANDONED, str(ROOT)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "written\n"


def test_what_is_given_after_the_end_is_still_done():
    done = []
    thread = WritingThread(done.append, "ended")
    thread.give(1)
    thread.end()
    thread.give(2)
    thread.wait(0)
    assert done == [1, 2]


def test_a_context_waits_and_tells_and_after_an_exception_only_ends():
    sinks = [ListSink(fails=1, error=OSError(28, "full"))]
    with pytest.raises(OSError, match="full"), FrameWriter(sinks) as writer:
        for _ in range(2):
            writer.give(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8))
    with pytest.raises(ZeroDivisionError), FrameWriter([ListSink(fails=0, error=OSError(28, "full"))]) as writer:
        writer.give(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8))
        raise ZeroDivisionError
