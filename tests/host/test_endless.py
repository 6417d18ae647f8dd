"""Length 0: a rollout that goes on until it is stopped, through the nodes; what it leaves is what a length would have left."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.states import disk_room
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import frame_folder
from adastate_pack.nodes import endless
from adastate_pack.nodes.host import queued
from adastate_pack.nodes.host.model import HostModel
from adastate_pack.nodes.host.output_files import output_file
from PIL import Image
from test_links import VIDEO, frames_of, ran, same_states  # noqa: F401  a fixture
from test_reports import raises_at, stop_after

LATENT, STATE = 0, 1


def report_of(out) -> dict:
    return json.loads(out.args[2])


def left_by(out) -> tuple[list[torch.Tensor], object]:
    """The frames of a run's files, and the state beside the first."""
    files = [output_file(name) for name in report_of(out)["videos"]]
    return [frames_of(path) for path in files], load_state(files[0].with_suffix(".state.safetensors"))


@pytest.fixture(autouse=True)
def some_end(monkeypatch):
    """What should have been stopped, and was not, ends after a minute."""
    monkeypatch.setattr(endless, "MOST_FRAMES", 801)


@pytest.fixture
def until(rollout, monkeypatch):
    """A rollout of length 0 that is stopped in its chunk of that number."""

    def call(chunks: int, **inputs):
        with monkeypatch.context() as patch:
            stop_after(patch, chunks)
            return rollout(**({"length": 0, "keep_latents": False} | inputs))

    return call


@pytest.fixture
def cases(model, node):
    rolling = node("AdaStateModelPreset")(model=model, preset="rolling_forcing").args[0]
    opened = node("AdaStateModelPreset")(model=model, preset="rolling_forcing", ending="open").args[0]
    auto = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto"}
    settings = {
        "ratio": 0.5, "warmup_frames": 9, "local_window_frames": 3, "sink_frames": 1, "ridge": "auto", "scope": "head",
        "rank": 8, "select": "residual", "absorb": True, "schedule": "once",
    }  # fmt: skip
    absorption = node("AdaStateAbsorption")(**settings).args[0]
    return {
        "plain": ({"positions": "absolute"}, {}),
        "anchor, two at once": ({"anchor": AnchorAdaptive(1), "batch_size": 2}, {}),
        "rolling": ({"model": rolling} | auto, {"model": opened}),
        "absorption": ({"absorption": absorption, "window_frames": 15}, {}),
    }


@pytest.mark.parametrize("case", ["plain", "anchor, two at once", "rolling", "absorption"])
@pytest.mark.sampled(2)
def test_what_a_stop_leaves_is_what_that_length_leaves(rollout, until, stream, cases, case):
    """Files and state, bit for bit; and from either state on, with a length or without."""
    inputs, closed = cases[case]
    out = until(5, **inputs, stream=stream())
    report = report_of(out)
    assert (report["ended"], report["length"]) == ("stopped", 0)
    assert report["stopped"] == {"frame": 57, "of": None, "by": "user"} and report["frames_total"] == 57
    assert report["kv_bytes_used"] == report["kv_bytes_planned"]
    whole = rollout(**(inputs | closed), length=57, keep_latents=False, stream=stream(keep_state=True))
    (frames, state), (expected, other) = left_by(out), left_by(whole)
    assert len(frames) == inputs.get("batch_size", 1) and [len(each) for each in frames] == [57] * len(frames)
    assert all(map(torch.equal, frames, expected))
    same_states(state, other)
    same_states(out.args[1], whole.args[1])

    longer = rollout(**(inputs | closed), length=81, keep_latents=False, stream=stream(keep_state=True))
    ended = rollout(**(inputs | closed), length=81, resume=state, stream=stream(keep_state=True, join=True))
    gone_on = until(2, **inputs, resume=other, stream=stream(join=True))
    for made in (ended, gone_on):
        _, last = left_by(made)
        same_states(last, left_by(longer)[1])
        assert [len(each) for each in left_by(made)[0]] == [81] * len(frames)
    assert torch.equal(left_by(gone_on)[0][0], left_by(ended)[0][0])
    assert report_of(gone_on)["stopped"]["frame"] == 81 and report_of(gone_on)["frames"] == 24


def test_it_says_what_it_does_otherwise(until, stream, cases, progress_told):
    inputs, _ = cases["rolling"]
    out = until(3, **inputs, stream=stream(), keep_latents=True, max_seconds=3600.0)
    report = report_of(out)
    assert report["settings"]["ending"] == "open" and "host_before_the_end" not in report["plan_bytes"]
    said = " ".join(report["warnings"])
    assert "keep_latents counts as off" in said and "its ending is open and not as published" in said
    assert "stopped at frame 33 of a video without an end; go on from its state" in said
    assert report["not_made"]["LATENT"] == endless.NO_LATENT and out.args[0].message == endless.NO_LATENT
    assert out.args[1].latents is None and "kept_latents" not in report["memory_planned"]["host"]
    assert all(value <= total <= 6 for value, total, _ in progress_told) and len({t for _, t, _ in progress_told}) > 1


def test_the_clock_and_the_longest_video_end_it_too(until, stream, rollout, monkeypatch):
    given = {"samples": torch.randn(1, 16, 4, 4, 4, generator=torch.Generator().manual_seed(3))}
    out = until(99, start_latent=given, max_seconds=0.001, stream=stream())
    report = report_of(out)
    assert report["stopped"] == {"frame": 9, "of": None, "by": "max_seconds"}
    assert "because max_seconds (0.001) had passed" in " ".join(report["warnings"])
    closed = rollout(length=49, start_latent=given, stream=stream(), keep_latents=False)
    assert torch.equal(left_by(out)[0][0], frames_of(output_file(report_of(closed)["videos"][0]))[:9])
    state = left_by(out)[1]
    monkeypatch.setattr(endless, "MOST_FRAMES", 49)
    gone_on = until(99, resume=state, stream=stream(join=True))
    assert report_of(gone_on)["stopped"] == {"frame": 49, "of": None, "by": "most"}
    with pytest.raises(ValueError, match="the state holds 49 frames and length is 0; .* no video may have more"):
        until(1, resume=gone_on.args[1], stream=stream())
    assert report_of(gone_on)["frames_total"] == 49
    for left in (gone_on.args[1], left_by(gone_on)[1]):
        same_states(left, closed.args[1])


def test_nothing_grows_while_it_rolls(until, stream, monkeypatch):
    """All tensors that are alive, their bytes, the states' and the report's, after chunk 5 and after chunk 50."""
    alive, chunks = {}, Rollout.chunks

    def watched(self, *arguments):
        for number, chunk in enumerate(chunks(self, *arguments), 1):
            yield chunk
            del chunk
            if number in (5, 50):
                self.streamed()  # what is written beside the next chunk is
                gc.collect()
                held = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
                bytes_of = {storage.data_ptr(): storage.nbytes() for storage in held}
                alive[number] = len(held), sum(bytes_of.values()), self.snapshot().nbytes, self.cache.nbytes
                del held

    monkeypatch.setattr(Rollout, "chunks", watched)
    out = until(51, steps=1, anchor=AnchorAdaptive(1), stream=stream(), keep_latents=True)
    report = report_of(out)
    assert report["chunks"] == 51 and alive[5][2:] == alive[50][2:]
    # what a chunk leaves would be there 45 times; a thread that is about to let one go may hold it at one of the two moments
    assert abs(alive[50][0] - alive[5][0]) < 3 and abs(alive[50][1] - alive[5][1]) < 10 * 4096
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] == alive[5][3]


def test_an_interrupt_leaves_what_it_leaves_of_any_run(rollout, stream, folders, monkeypatch, interrupt):
    raises_at(monkeypatch, HostModel, "velocity", interrupt(), call=8)  # two steps and a clean pass a chunk
    with pytest.raises(interrupt):
        rollout(length=0, stream=stream())
    [path] = (folders / "output").glob("*.report.json")
    report = json.loads(path.read_text())
    assert (report["ended"], report["length"], report["frames_total"]) == ("interrupted", 0, 21)
    video = output_file(report["videos"][0])
    assert len(frames_of(video)) == 21 and load_state(video.with_suffix(".state.safetensors")).emitted == 6


def test_what_it_cannot_do_is_refused_first(rollout, stream, node, model, folders, cases):
    with pytest.raises(ValueError, match="length is 0, which rolls until it is stopped, and that needs a stream"):
        rollout(length=0)
    with pytest.raises(ValueError, match="length is -2; it must be between -1 and 16777216"):
        rollout(length=-2, stream=stream())
    with pytest.raises(
        ValueError, match="length is -1, which stands for as long as the sound, and audio is not connected"
    ):
        rollout(length=-1, stream=stream())
    assert "length is 0; it must be between 1" in node("AdaStateInspectCheckpoint").validate(length=0)
    text, numbers = node("AdaStatePlan")(model=model, width=32, height=32, length=0).args
    closed = json.loads(node("AdaStatePlan")(model=model, width=32, height=32, length=81).args[1])
    assert "rolled until it is stopped" in text and json.loads(numbers)["plan_bytes"] == closed["plan_bytes"]
    rolling = json.loads(
        node("AdaStatePlan")(model=cases["rolling"][0]["model"], width=32, height=32, length=0).args[1]
    )
    assert "host_before_the_end" not in rolling["plan_bytes"]
    assert json.loads(numbers)["kept_latents_bytes"] == 0 and list(folders.joinpath("output").iterdir()) == []


def test_it_is_refused_when_queued_where_links_say_no(ran, execute):  # noqa: F811
    """As the host's server tells of a prompt before it validates it."""
    prompts = []
    ran.execute = lambda prompt: prompts.append(prompt) or {}
    ran(length=0)
    ran(LATENT, STATE, length=0, stream={})
    ran(STATE, VIDEO, length=0, stream={})
    ran(LATENT, length=57, stream={})
    sentences = [endless.NO_STREAM, endless.LATENT_LINKED, None, None]
    for prompt, sentence in zip(prompts, sentences, strict=True):
        queued._remember({"prompt": prompt})
        valid, details = execute.check(prompt)
        assert valid == (sentence is None) and (sentence or "") in details
    for odd in (None, [], {"prompt": 5}, {"prompt": {"5": 3}}, {"prompt": {"5": {"inputs": {"stream": 1}}, "6": []}}):
        queued._remember(odd)  # of another prompt, or none: only running it can tell
        assert execute.check(prompts[1])[0]
    assert ran.rolled == 0


def test_a_linked_latent_is_refused_before_anything_is_made(ran, folders, caplog):  # noqa: F811
    queued._remember(None)
    with pytest.raises(AssertionError):
        ran(LATENT, length=0, stream={})
    assert endless.LATENT_LINKED in caplog.text and ran.rolled == 0 and list((folders / "output").iterdir()) == []


def test_what_was_stopped_is_replayed_and_gives_its_state(ran, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        _, report = ran(stream={}, length=0)
        assert report["stopped"]["frame"] == 45 and ran.rolled == 1
    ran(VIDEO, stream={}, length=0)
    assert ran.rolled == 1
    [state, video], report = ran(STATE, VIDEO, stream={}, length=0)
    assert ran.rolled == 1 and state.emitted == 12 and video.get_frame_count() == 45
    assert "nothing was made again" in report["warnings"][-1]


def test_without_its_state_the_same_video_is_made_again(ran, monkeypatch, folders):  # noqa: F811
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        ran(stream={}, length=0)
    for path in (folders / "output").glob("*.state.safetensors"):
        path.unlink()
    [state], report = ran(STATE, stream={}, length=0)
    assert ran.rolled == 2 and state.emitted == 9 and report["frames_total"] == 33


def test_it_stops_while_the_disk_has_room_for_its_end(until, stream, monkeypatch, folders, rollout, node):
    """A disk that fills up as the video and its states grow, and is never full."""
    size, least = [10**9], []

    def usage(path):
        held = sum(file.stat().st_size for file in (folders / "output").rglob("*") if file.is_file())
        least.append(size[0] - held)
        return SimpleNamespace(total=10**12, free=least[-1])

    monkeypatch.setattr(disk_room.shutil, "disk_usage", usage)
    monkeypatch.setattr(endless, "_FOR_OTHERS", 0)
    probe = until(1, stream=stream(filename_prefix="probe"))
    kept = endless._CHUNKS_AHEAD * 12 * 32 * 32 * 3 + probe.args[1].nbytes
    for path in (folders / "output").iterdir():
        path.unlink()
    size[0] = 2 * kept + 40_000
    out = until(99, stream=stream(autosave_seconds=0.001))
    report = report_of(out)
    assert report["stopped"]["by"] == "disk" and 9 < report["frames_total"] < 99 * 12 and report["state"]
    assert "are kept for finishing its files and saving its state (free some room" in " ".join(report["warnings"])
    assert not any("could not be" in sentence for sentence in report["warnings"])
    [frames], state = left_by(out)
    assert len(frames) == report["frames_total"] and state.emitted == (len(frames) + 3) // 4
    assert min(least) > probe.args[1].nbytes and usage(None).free > 0
    whole = rollout(length=report["frames_total"], keep_latents=False, stream=stream(filename_prefix="whole"))
    assert torch.equal(frames, frames_of(output_file(report_of(whole)["videos"][0])))
    size[0] = 10**9
    monkeypatch.setattr(frame_folder, "MOST_BYTES", chunks := endless._CHUNKS_AHEAD * 12 * 32 * 32 * 3 * 4 + 60_000)
    frames = node("AdaStateStreamFrames")(
        stream=stream(), filename_prefix="web/a", format="webp", fps=16.0, preview=False, join=False
    )
    report = report_of(until(99, stream=frames.args[0]))
    assert report["stopped"]["by"] == "file" and "an animated WebP may have" in " ".join(report["warnings"])
    [path] = (folders / "output").rglob("*.webp")
    assert 0 < path.stat().st_size < chunks and Image.open(path).n_frames == report["frames_total"] > 9
    size[0] = 2 * kept
    with pytest.raises(ValueError, match="length is 0, so .* are kept free for the video's end and its state"):
        until(99, stream=stream())
