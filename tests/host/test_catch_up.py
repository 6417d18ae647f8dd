"""Resuming a state without the decoder's cache: what is decoded and copied again, and that it is seen and can be cancelled."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import comfy.model_management as management
import pytest
import torch
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.adastate_core.video.picture_forms import to_bytes
from adastate_pack.nodes import output
from adastate_pack.nodes.host.codec import HostDecoder
from adastate_pack.nodes.host.progress import Progress

Interrupted = management.InterruptProcessingException


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1} | inputs))


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"preview": True} | inputs))


def report_of(folders: Path, name: str) -> dict:
    return json.loads((folders / "output" / name).read_text())


@pytest.fixture
def kept(rollout):
    """A state of 110 latent frames without a decoder's cache."""
    return rollout(length=437, chunk_frames=11, window_frames=11, keep_latents=True).args[1]


def resumed(rollout, stream, kept, **more):
    return rollout(length=441, chunk_frames=11, window_frames=11, resume=kept, stream=stream(**more))


@torch.no_grad()
def test_a_decoder_that_begins_anew_stands_where_the_whole_one_does(vae):
    z = torch.randn(2, 16, 104, 4, 4, generator=torch.Generator().manual_seed(3))
    whole = HostDecoder(vae)
    for frame in range(100):
        whole.step(z[:, :, frame : frame + 1])
    for count, same in ((whole.reach, True), (whole.reach // 2, True), (8, False)):
        anew = HostDecoder(vae)
        anew.skip(100 - count)
        for frame in range(100 - count, 100):
            anew.step(z[:, :, frame : frame + 1])
        one, other = whole.snapshot(), anew.snapshot()
        assert one.keys() == other.keys() and one["vae_latents_seen"] == other["vae_latents_seen"] == 100
        tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
        assert len(tensors) > 20 and all(torch.equal(one[name], other[name]) for name in tensors) == same
        mark = whole.mark()
        assert torch.equal(whole.step(z[:, :, 100:]), anew.step(z[:, :, 100:])) == same
        whole.rewind(mark)


def test_a_resume_decodes_no_more_than_the_decoder_looks_back_to(rollout, stream, kept, vae, monkeypatch):
    with torch.no_grad():
        whole = vae.decode(resumed(rollout, lambda **_: None, kept).args[0]["samples"])[0]
    decoded, written = [], []
    step, write = HostDecoder.step, video_sink.VideoSink.write
    monkeypatch.setattr(
        HostDecoder, "step", lambda self, z, *takes: (decoded.append(z.shape[2]), step(self, z, *takes))[1]
    )
    monkeypatch.setattr(video_sink.VideoSink, "write", lambda self, p: (written.append(p.clone()), write(self, p))[1])
    resumed(rollout, stream, kept)
    reach = HostDecoder(vae).reach
    assert decoded == [1] * reach + [1] and reach < 110
    assert torch.equal(torch.cat(written), to_bytes(whole[437:]))


def test_what_is_decoded_again_is_seen_and_can_be_interrupted_at_every_frame(
    rollout, stream, kept, folders, monkeypatch
):
    reach, bars, decoded, step = HostDecoder(stream().vae).reach, [], [], HostDecoder.step
    update = management.throw_exception_if_processing_interrupted

    class Bar:
        def __init__(self, total):
            self.total = total
            bars.append([])

        def update_absolute(self, value, total=None, preview=None):
            bars[-1].append((value, self.total, len(decoded)))

    monkeypatch.setattr("comfy.utils.ProgressBar", Bar)
    monkeypatch.setattr(HostDecoder, "step", lambda self, z, *takes: (decoded.append(1), step(self, z, *takes))[1])
    before = sorted(folders.rglob("*"))
    resumed(rollout, stream, kept)
    again = [entry for entry in bars[-1] if entry[2] < reach]
    assert [value for value, _, _ in again] == list(range(1, reach + 1)), "one step a frame"
    values, totals = [value for value, _, _ in bars[-1]], {total for _, total, _ in bars[-1]}
    assert values == sorted(values) and totals == {values[-1]}, "the bar ends where it said"
    for frames in (0, 1, 40):
        decoded.clear()

        def cut(frames=frames):
            if len(decoded) == frames:
                management.interrupt_current_processing()
            update()

        monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cut)
        with pytest.raises(Interrupted):
            resumed(rollout, stream, kept, filename_prefix="cut")
        assert len(decoded) == frames
    left = set(folders.rglob("*")) - set(before)
    assert sorted(path.name for path in left if path.name.startswith("cut")) == [
        f"cut_0000{number}_.report.json" for number in (1, 2, 3)
    ]
    assert report_of(folders, "cut_00003_.report.json")["ended"] == "interrupted"


def test_frames_that_are_copied_can_be_interrupted_and_are_seen(rollout, stream, folders, monkeypatch):
    state = rollout(length=21, stream=stream()).args[1]
    monkeypatch.setattr(output, "FRAMES_A_STEP", 4)
    bars, interrupt, copied = [], management.throw_exception_if_processing_interrupted, []
    mux = video_sink.VideoSink._mux
    monkeypatch.setattr(video_sink.VideoSink, "_mux", lambda self, packet: (mux(self, packet), copied.append(1)))
    update = Progress.step
    monkeypatch.setattr(
        Progress, "step", lambda self, n=1: (update(self, n), bars.append((self._done, self._bar.total)))
    )
    made = rollout(length=33, resume=state, stream=stream(join=True))
    assert made.args[3].get_frame_count() == 33
    assert bars[:5] == [(number, bars[0][1]) for number in range(1, 6)] and bars[-1][0] == bars[-1][1]
    copied.clear()

    def cut():
        if len(copied) == 7:
            management.interrupt_current_processing()
        interrupt()

    monkeypatch.setattr(management, "throw_exception_if_processing_interrupted", cut)
    with pytest.raises(Interrupted):
        rollout(length=33, resume=state, stream=stream(filename_prefix="cut", join=True))
    assert len(copied) == 7 and sorted(os.listdir(folders / "output")) == [
        "cut_00001_.report.json",
        "take_00001_.mp4",
        "take_00001_.report.json",
        "take_00002_.mp4",
        "take_00002_.report.json",
    ]


def test_the_memory_of_what_is_decoded_again_does_not_grow(rollout, stream, kept, monkeypatch):
    held, most, step = [], [], HostDecoder.step

    def watched(self, z, *takes):
        pictures = step(self, z, *takes)
        most.append(sum(each() is not None for each in held))
        held.append(weakref.ref(pictures))
        return pictures

    monkeypatch.setattr(HostDecoder, "step", watched)
    resumed(rollout, stream, kept)
    assert len(most) > 90 and max(most) <= 1
