"""Frames that leave a GPU which does nothing before somebody waits for it: the sinks get the CPU's bits, from buffers made once."""

from __future__ import annotations

import threading

import pytest
import torch
from late_device import Event, LateDevice
from tiny_stream import BATCH, HEIGHT, WIDTH, ListSink, TinyDecoder, chunks, decoded, writers

from adastate_core.video import page_locked
from adastate_core.video.decoded_stream import MARKS, VideoStream
from adastate_core.video.frame_writer import FrameWriter
from adastate_core.video.page_locked import Landed, Landing
from adastate_core.video.picture_forms import in_form

MOST = BATCH * 12 * HEIGHT * WIDTH * 3  # bytes of a chunk's pictures


class SlowSink(ListSink):
    """Writes a chunk when the one behind it has been given, so that two are under way all the time."""

    def __init__(self, takes: str = "bytes") -> None:
        super().__init__(takes)
        self.turns = threading.Semaphore(0)

    def write(self, pictures: torch.Tensor) -> None:
        self.turns.acquire(timeout=20)
        super().write(pictures)


def streamed(when: str, takes: str = "bytes", count: int = 7, nbytes: int = 0, most: int = MOST):
    """The sinks' pictures, the addresses of the buffers that were used, and how many copies nobody waited for."""
    sinks = [SlowSink(takes), ListSink(takes)]
    with LateDevice(when) as late:
        stream = VideoStream(TinyDecoder(late.device, nbytes), sinks, most=most)
        places = set()
        for i, chunk in enumerate(chunks(count)):
            if i >= (1 if nbytes > MARKS else 2):
                sinks[0].turns.release()
            shown = stream.step(chunk)
            shown.wait()  # as a preview does
            places.add(shown._pictures.data_ptr())
        sinks[0].turns.release(count)
        stream.drain()
        kept = shown.kept(1)
        stream.close()
        copies = late.to_host
    assert torch.equal(kept, sinks[1].chunks[-1])
    return [sink.pictures for sink in sinks], places, copies


def same(found: list[torch.Tensor], takes: str = "bytes", count: int = 7) -> bool:
    whole = decoded(chunks(count))
    return all(torch.equal(one, in_form(item, takes)) for one, item in zip(found, whole, strict=True))


@pytest.mark.parametrize("takes", ["bytes", "integers", "float"])
@pytest.mark.parametrize("when", ["late", "early", "at once"])
def test_the_sinks_get_the_bits_of_the_cpu(when, takes):
    size = {"bytes": 1, "integers": 2, "float": 4}[takes]
    found, places, copies = streamed(when, takes, most=MOST * size)
    assert same(found, takes)
    assert len(places) <= 2 and copies == 7
    assert not writers()


def test_beside_a_large_cache_one_buffer_is_enough():
    found, places, copies = streamed("late", nbytes=MARKS + 1)
    assert same(found) and len(places) == 1 and copies == 7


@pytest.mark.parametrize("missing", ["wait for the event", "wait for a free buffer"])
def test_a_wait_that_is_missing_gives_other_pictures(monkeypatch, missing):
    if missing == "wait for the event":
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    else:
        monkeypatch.setattr(page_locked._Buffer, "free", property(lambda self: True))
    wrong = []
    for when in ("late", "early"):
        try:
            wrong.append(not same(streamed(when)[0]))
        except AssertionError:
            wrong.append(True)
    assert all(wrong)


def test_pictures_that_are_kept_stay_when_their_buffer_is_filled_anew():
    latents, sinks = chunks(5), [ListSink(), ListSink()]
    with LateDevice("late") as late:
        stream = VideoStream(TinyDecoder(late.device), sinks, most=MOST)
        kept = [stream.step(chunk).kept(1) for chunk in latents]
        stream.close()
    assert torch.equal(torch.cat(kept), in_form(decoded(latents)[1], "bytes"))


def test_a_writer_alone_keeps_to_two_buffers_however_slow_its_sink_is():
    sink, pictures = SlowSink(), torch.rand(9, 1, 4, 5, 3)
    with LateDevice("late") as late:
        writer, done = FrameWriter([sink], 60), []
        for part in in_form(pictures, "bytes").to(late.device).split(1):
            if len(done) >= 2:
                threading.Timer(0.02, sink.turns.release).start()
            writer.give(part)
            done.append(len(writer.under_way))
        sink.turns.release(9)
        writer.wait()
        writer.end()
        assert max(done) == 2 and writer.nbytes == 120
    assert torch.equal(sink.pictures, in_form(pictures[:, 0], "bytes"))


def test_buffers_are_counted_and_made_once_or_for_what_needs_more():
    with LateDevice("late") as late:
        landing, pictures = Landing(1000), torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8, device=late.device)
        one, other = landing.take(pictures), landing.take(pictures)
        assert landing.nbytes == 2000 and one._pictures.data_ptr() != other._pictures.data_ptr()
        one.release()
        assert landing.take(pictures)._pictures.data_ptr() == one._pictures.data_ptr() and landing.nbytes == 2000
        other.release()
        large = torch.zeros(1, 20, 4, 5, 3, dtype=torch.uint8, device=late.device)
        assert landing.take(large).wait().shape == large.shape
        assert landing.nbytes == 1000 + large.nbytes  # the free one was too small, the other is being read
        late.synchronize()


def test_where_no_memory_can_be_page_locked_a_copy_that_waits_is_made(monkeypatch, caplog):
    def refused(size):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(page_locked, "_Buffer", refused)
    found, places, copies = streamed("late")
    assert same(found) and copies == 0 and len(places) > 1
    assert caplog.text.count("no memory could be page-locked") == 1


def test_pictures_of_the_cpu_are_not_copied_and_need_no_buffer():
    landing, pictures = Landing(1000), torch.zeros(1, 2, 4, 5, 3, dtype=torch.uint8)
    landed = landing.take(pictures)
    assert isinstance(landed, Landed) and landing.nbytes == 0
    assert landed.wait().data_ptr() == pictures.data_ptr() == landed.kept(0).data_ptr()


def test_what_the_device_failed_with_is_told_by_the_next_chunk(monkeypatch):
    """As CUDA tells errors: where somebody waits, here the thread."""
    sinks = [ListSink(), ListSink()]
    with LateDevice("late") as late:
        stream = VideoStream(TinyDecoder(late.device), sinks, most=MOST)
        latents = chunks(3)
        stream.step(latents[0])
        stream.drain()

        def broken(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(Event, "synchronize", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            for chunk in latents[1:]:
                stream.step(chunk)
            stream.drain()
        monkeypatch.undo()
        assert stream.frames == 9 and stream.take_back() in (1, 2) and stream.decoder.seen == 3
        stream.close()
