"""What is done beside a rollout, states, previews, reports, and fails: the run goes on, and what is finished is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.cache.kv_cache import KVCache
from adastate_pack.adastate_core.decode.wan_vae import VaeStream
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.states import spacing
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes import job, output, saved_states
from adastate_pack.nodes.host import live_runs as live
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host import safely
from adastate_pack.nodes.host.codec import HostDecoder
from adastate_pack.nodes.host.progress import Progress
from comfy_execution.utils import CurrentNodeContext

Interrupted = comfy.model_management.InterruptProcessingException
NO_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nto"),
    MemoryError(),
    RuntimeError("cannot allocate"),
]


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1, "length": 57} | inputs))  # five chunks of three latent frames


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"preview": True} | inputs))


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def failing(monkeypatch, owner, name: str, error: BaseException, calls: set[int] | None = None) -> list[int]:
    """From now on these calls (from 1; None: all) of a method raise; the list grows with every call."""
    original, made = getattr(owner, name), []

    def call(*given, **named):
        made.append(len(made) + 1)
        if calls is None or made[-1] in calls:
            raise error
        return original(*given, **named)

    monkeypatch.setattr(owner, name, call)
    return made


def warnings_of(result, than=None) -> list[str]:
    known = json.loads(than.args[2])["warnings"] if than else []
    return [sentence for sentence in json.loads(result.args[2])["warnings"] if sentence not in known]


def blocked(value) -> str:
    assert type(value).__name__ == "ExecutionBlocker"
    return value.message


def same_outputs(result, whole, names="LATENT STATE VIDEO") -> None:
    latent, state, _, video = result.args
    if "LATENT" in names:
        assert torch.equal(latent["samples"], whole.args[0]["samples"])
    if "STATE" in names:
        assert (state.next_chunk, state.emitted) == (whole.args[1].next_chunk, whole.args[1].emitted)
    assert torch.equal(frames_of(video.get_stream_source()), frames_of(whole.args[3].get_stream_source()))


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", [Rollout, VaeStream], ids=lambda where: where.__name__)
@pytest.mark.sampled(3)
def test_an_autosave_that_cannot_be_taken_is_taken_the_next_time(rollout, stream, monkeypatch, where, error):
    whole, saved = rollout(stream=stream(filename_prefix="whole")), []
    monkeypatch.setattr(saved_states, "save_state", lambda state, path: saved.append(state.emitted))
    failing(monkeypatch, where, "snapshot", error, {2, 4})
    result = rollout(stream=stream(autosave_seconds=1e-9))
    assert saved == [3, 9]  # after chunks 1 and 3; those after 2 and 4 failed
    [warning] = warnings_of(result, whole)
    reason = str(error).partition("\n")[0] or type(error).__name__
    assert warning.startswith(f"2 states of take_00001_.mp4 could not be saved on the way ({reason})")
    same_outputs(result, whole)


def test_the_next_time_is_a_whole_interval_later(rollout, stream, monkeypatch):
    now = [0.0]
    for module in (saved_states, spacing):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    original = HostDecoder.step

    def step(self, latents, *takes):
        now[0] += 40
        return original(self, latents, *takes)

    monkeypatch.setattr(HostDecoder, "step", step)
    failed = []
    original_snapshot = Rollout.snapshot

    def snapshot(self, *given):
        if self.emitted < 27:
            failed.append(self.emitted)
            raise MemoryError
        return original_snapshot(self, *given)

    monkeypatch.setattr(Rollout, "snapshot", snapshot)
    result = rollout(length=105, stream=stream(autosave_seconds=100))
    assert failed == [9, 18]  # chunks 3 and 6, each 40 s
    assert "2 states of take_00001_.mp4 could not be saved on the way (MemoryError)" in "".join(warnings_of(result))


def test_a_state_of_the_history_that_cannot_be_taken_is_left_out(rollout, stream, folders, monkeypatch):
    whole = rollout(stream=stream(filename_prefix="whole", history_chunks=1))
    failing(monkeypatch, Rollout, "snapshot", MemoryError("no room"), {2})
    result = rollout(stream=stream(history_chunks=1))
    assert json.loads(result.args[2])["history"] == [1, 3, 4, 5]
    assert len(warnings_of(result, whole)) == 1 and "(no room)" in warnings_of(result, whole)[0]
    same_outputs(result, whole)


def test_a_state_that_cannot_be_written_is_told(rollout, stream, monkeypatch):
    whole = rollout(stream=stream(filename_prefix="whole"))
    failing(monkeypatch, saved_states, "save_state", OSError(28, "No space left on device"))
    result = rollout(stream=stream(autosave_seconds=1e-9))
    [warning] = warnings_of(result, whole)
    assert "4 states of take_00001_.mp4 could not be saved beside it as take_00001_.state.safetensors" in warning
    same_outputs(result, whole)


def test_an_interrupt_passes_through_a_snapshot(rollout, stream, folders, monkeypatch):
    failing(monkeypatch, Rollout, "snapshot", Interrupted(), {2})
    with pytest.raises(Interrupted):
        rollout(stream=stream(autosave_seconds=1e-9))
    assert load_state(folders / "output" / "take_00001_.state.safetensors").emitted == 6


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_the_last_snapshot_is_tried_again_with_more_memory(rollout, stream, monkeypatch, error):
    whole = rollout(stream=stream(filename_prefix="whole"))
    given_back = failing(monkeypatch, safely, "soft_empty_cache", RuntimeError("the device is gone"))
    calls = failing(monkeypatch, Rollout, "snapshot", error, {1})
    result = rollout(stream=stream())
    assert len(calls) == 2 and given_back and warnings_of(result, whole) == []
    same_outputs(result, whole)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_whole_run_without_its_last_state_gives_all_else(rollout, stream, monkeypatch, streamed):
    whole = rollout(stream=stream(filename_prefix="whole"))
    failing(monkeypatch, Rollout, "snapshot", NO_MEMORY[0])
    result = rollout(stream=stream() if streamed else None)
    [warning] = warnings_of(result, whole)
    assert blocked(result.args[1]) == warning
    assert warning.startswith(
        "STATE could not be made of the finished rollout (CUDA out of memory. Tried): free some memory"
    )
    assert json.loads(result.args[2])["frames"] == 57 and json.loads(result.args[2])["state_bytes"] is None
    if streamed:
        same_outputs(result, whole, "LATENT VIDEO")
    else:
        assert torch.equal(result.args[0]["samples"], whole.args[0]["samples"])


def test_the_state_that_was_saved_last_is_named_instead(rollout, stream, folders, monkeypatch):
    failing(monkeypatch, Rollout, "snapshot", MemoryError(), set(range(2, 99)))
    result = rollout(stream=stream(autosave_seconds=1e-9, keep_state=True))
    assert "Load Rollout State has take_00001_.state.safetensors [output]" in blocked(result.args[1])
    state = load_state(folders / "output" / "take_00001_.state.safetensors")
    monkeypatch.undo()
    again = rollout(stream=stream(), resume=state)
    assert state.emitted == 3 and torch.equal(again.args[0]["samples"], result.args[0]["samples"])


def test_latents_that_cannot_be_joined_leave_the_other_outputs(rollout, stream, monkeypatch):
    whole = rollout(stream=stream(filename_prefix="whole"))
    failing(monkeypatch, job.Job, "_latents", MemoryError("no room"))
    result = rollout(stream=stream())
    assert blocked(result.args[0]) in warnings_of(result, whole) and "LATENT could not be made" in blocked(
        result.args[0]
    )
    same_outputs(result, whole, "STATE VIDEO")


def test_a_report_that_cannot_be_made_leaves_the_other_outputs(rollout, stream, monkeypatch):
    whole = rollout(stream=stream(filename_prefix="whole"))
    monkeypatch.setattr(KVCache, "text_nbytes", property(lambda cache: 1 / 0))
    result = rollout(stream=stream())
    report = json.loads(result.args[2])
    assert (report["frames"], report["chunks"], report["files"]) == (57, 5, ["take_00001_.mp4"])
    assert "REPORT could not be made of the finished rollout (division by zero)" in "".join(report["warnings"])
    same_outputs(result, whole)


@pytest.mark.parametrize("what", ["preview", "latent preview", "start", "facts", "page", "server"])
@pytest.mark.sampled(3)
def test_what_cannot_be_shown_does_not_end_a_run(rollout, stream, monkeypatch, what):
    whole, made = rollout(stream=stream(filename_prefix="whole")), []
    monkeypatch.setattr(live.LiveRun, "watched", property(lambda run: True))
    if what != "server":
        monkeypatch.setattr(live.LiveRun, "_send", lambda run, *_: None)
    broken = {
        "preview": (Progress, "preview"),
        "latent preview": (Progress, "preview_latent"),
        "start": (job, "run_facts"),
        "facts": (job, "chunk_facts"),
        "page": (live.LiveRun, "chunk"),
        "server": (live, "prompt_server"),
    }
    made = failing(monkeypatch, *broken[what], RuntimeError("nobody is there"))
    if what == "latent preview":
        assert torch.equal(rollout().args[0]["samples"], whole.args[0]["samples"])
    elif what == "server":
        run = live.LiveRun(None)
        run.started({})
        run.end("done")
    else:
        result = rollout(stream=stream())
        assert warnings_of(result, whole) == []
        same_outputs(result, whole)
    assert made


def test_a_server_that_is_gone_costs_no_result(rollout, monkeypatch):
    whole = rollout()

    def gone(*_):
        raise RuntimeError("Event loop is closed")

    server = SimpleNamespace(client_id="c", sockets={"c": 1}, send_sync=gone)
    monkeypatch.setattr(live, "prompt_server", lambda: server)
    with CurrentNodeContext("prompt", "8", 0):
        assert torch.equal(rollout().args[0]["samples"], whole.args[0]["samples"])


@pytest.mark.parametrize("chunk", [2, 5])
def test_an_interrupt_passes_through_a_preview(rollout, stream, folders, monkeypatch, chunk):
    """The last one's too: all frames are there then, and a state to go on from."""
    failing(monkeypatch, Progress, "preview", Interrupted(), {chunk})
    with pytest.raises(Interrupted):
        rollout(stream=stream())
    state = load_state(folders / "output" / "take_00001_.state.safetensors")
    assert state.emitted == 3 * chunk and len(frames_of(folders / "output" / "take_00001_.mp4")) == 12 * chunk - 3


@pytest.mark.parametrize("frames", [0, 21])
def test_what_ends_a_run_is_what_is_told(rollout, stream, monkeypatch, frames):
    """Whatever fails while the files are finished, the first failure is raised."""
    for owner, name in (
        (video_sink, "remux"),
        (video_sink.VideoSink, "stop"),
        (saved_states, "save_state"),
        (safely, "soft_empty_cache"),
        (output.StreamOutput, "saved"),
        (Path, "unlink"),
    ):
        failing(monkeypatch, owner, name, OSError(28, "and another one"))
    failing(monkeypatch, adapter.HostModel, "velocity", NO_MEMORY[0], {1 if not frames else 5})
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory"):
        rollout(stream=stream())


@pytest.mark.parametrize("error", [*NO_MEMORY, ValueError("two\nlines" + 999 * "x")], ids=lambda e: type(e).__name__)
def test_a_reason_is_short(error):
    made, reason = safely.attempt("it", lambda: (_ for _ in ()).throw(error))
    assert made is None and 0 < len(reason) <= 200 and "\n" not in reason
    assert safely.attempt("it", lambda: 3) == (3, "")
