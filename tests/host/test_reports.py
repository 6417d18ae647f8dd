"""The report beside a video at every end of its rollout, and the time limit."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import av
import comfy.model_management as management
import pytest
import torch
from adastate_pack.adastate_core.files import whole_file
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video import sink as video_sink
from adastate_pack.nodes import job, output, preflight, report, stream_parts
from adastate_pack.nodes.host import error_types
from adastate_pack.nodes.host import live_runs as live
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host import output_files as files
from adastate_pack.nodes.host.codec import HostDecoder
from adastate_pack.nodes.host.model import HostModel
from adastate_pack.nodes.host.progress import Progress
from comfy_execution.utils import CurrentNodeContext
from conftest import PACK

Interrupted = management.InterruptProcessingException
ALWAYS = {
    "ended", "error", "prompt_id", "node_id", "videos", "state", "length", "chunks", "frames", "frames_total", "video_seconds",
    "video_fps", "seconds", "seconds_all", "seconds_per_chunk", "fps", "speed", "files", "plan_bytes", "kv_bytes_planned",
    "settings", "prompts", "decoder", "warnings",
}  # fmt: skip


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1, "length": 57} | inputs))  # five chunks of three latent frames


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"filename_prefix": "video/take", "preview": True} | inputs))


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def read(folders: Path, name: str = "video/take_00001_.report.json") -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folders / "output" / name).read_text(), parse_constant=refuse)


def raises_at(monkeypatch, owner, name: str, error: BaseException, call: int = 1) -> None:
    """One call (from 1) of a method raises."""
    original, made = getattr(owner, name), []

    def one(*given, **named):
        made.append(1)
        if len(made) == call:
            raise error
        return original(*given, **named)

    monkeypatch.setattr(owner, name, one)


def stop_after(monkeypatch, chunks: int) -> None:
    """Whoever watches asks to stop once so many chunks were shown."""
    shown, show = [], job.Job._show

    def then_stop(self, run, view: live.LiveRun, *chunk) -> None:
        show(self, run, view, *chunk)
        shown.append(1)
        if len(shown) == chunks:
            view.stop()

    monkeypatch.setattr(job.Job, "_show", then_stop)


FAILURES = [
    ("out_of_memory", HostModel, "velocity", torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")),
    ("out_of_memory", HostModel, "velocity", MemoryError()),
    ("out_of_memory", HostModel, "velocity", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x")),
    ("device_error", HostModel, "velocity", RuntimeError("CUDA error: an illegal memory access was encountered\nfor")),
    ("disk_full", video_sink.VideoSink, "write", OSError(28, "No space left on device", "/secret/take.mp4")),
    ("disk_full", video_sink.VideoSink, "_mux", av.error.OSError(28, "No space left on device", "/secret/take.mp4")),
    ("disk_full", video_sink.VideoSink, "write", OSError(122, "Disk quota exceeded")),
    ("file_error", video_sink.VideoSink, "write", PermissionError(13, "Permission denied", "/secret/take.mp4")),
    ("video_error", video_sink.VideoSink, "write", av.error.InvalidDataError(1094995529, "Invalid data found", "/secret")),
    ("refused_input", HostModel, "velocity", ValueError("width is 100; it must be a multiple of 16: try 96")),
    ("internal_error", HostDecoder, "step", RuntimeError("decode broke")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "owner", "name", "error"), FAILURES, ids=lambda value: str(value)[:20])
@pytest.mark.sampled(2)
def test_a_failure_is_named_and_keeps_what_there_was(rollout, stream, folders, monkeypatch, kind, owner, name, error):
    raises_at(monkeypatch, owner, name, error, 26 if name == "_mux" else 5 if name == "velocity" else 3)
    with pytest.raises(type(error)) as raised, CurrentNodeContext("a-prompt", "17", 0):
        rollout(stream=stream())
    assert raised.value is error
    told, state = read(folders), load_state(folders / "output/video/take_00001_.state.safetensors")
    assert (told["ended"], told["error"]["type"]) == ("failed", kind) and told.keys() >= ALWAYS
    message = told["error"]["message"]
    assert message and "\n" not in message and "/secret" not in message
    assert (told["prompt_id"], told["node_id"], told["length"]) == ("a-prompt", "17", 57)
    assert told["videos"] == ["video/take_00001_.mp4"] and told["files"] == ["take_00001_.mp4"]
    assert told["state"] == "video/take_00001_.state.safetensors [output]"
    assert told["frames_total"] == told["frames"] == state.stream["frames_written"] == 21
    assert told["kv_bytes_used"] == told["kv_bytes_planned"] and told["settings"]["seed"] == 5


def test_nan_of_the_model_and_of_the_decoder_have_one_name(rollout, stream, folders, monkeypatch):
    original, calls = HostModel.velocity, []

    def velocity(self, *given):
        calls.append(1)
        return original(self, *given) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(HostModel, "velocity", velocity)
    with pytest.raises(RuntimeError):
        rollout(stream=stream())
    assert read(folders)["error"]["type"] == "non_finite" and "chunk 2" in read(folders)["error"]["message"]
    monkeypatch.undo()
    raises_at(monkeypatch, HostDecoder, "step", error_types.NonFinitePicturesError("NaN"), 2)
    with pytest.raises(error_types.NonFinitePicturesError):
        rollout(stream=stream())
    assert read(folders, "video/take_00002_.report.json")["error"] == {"type": "non_finite", "message": "NaN"}


def test_every_name_is_in_the_table_of_the_page():
    page = (PACK / "docs" / "api.md").read_text(encoding="utf-8")
    table = page[page.index("| `type` |") :].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == ("type", *error_types.NAMES)


@pytest.mark.parametrize("where", ["pass", "decode", "autosave", "last state", "preview", "result"])
@pytest.mark.sampled(2)
def test_an_interrupt_is_no_failure(rollout, stream, folders, monkeypatch, where):
    places = {
        "pass": (HostModel, "velocity", 5),
        "decode": (HostDecoder, "step", 3),
        "autosave": (Rollout, "snapshot", 2),
        "last state": (output.StreamOutput, "_save_last", 1),
        "preview": (Progress, "preview", 5),
        "result": (job.Job, "_latents", 1),
    }
    owner, name, call = places[where]
    raises_at(monkeypatch, owner, name, Interrupted(), call)
    with pytest.raises(Interrupted):
        rollout(stream=stream(autosave_seconds=1e-9 if where == "autosave" else 0.0))
    told = read(folders)
    assert (told["ended"], told["error"]) == ("interrupted", None) and told.keys() >= ALWAYS
    frames = {"pass": 21, "decode": 21, "autosave": 21}.get(where, 57)
    assert told["frames_total"] == frames == len(frames_of(folders / "output" / told["videos"][0]))
    if where in ("pass", "decode", "autosave", "preview"):
        name = told["state"].removesuffix(" [output]")
        assert load_state(folders / "output" / name).stream["frames_written"] == frames


def test_whole_and_stopped_say_on_disk_what_the_output_says(rollout, stream, folders, monkeypatch):
    whole = rollout(stream=stream(fps=25.0))
    assert read(folders) == json.loads(whole.args[2]) and read(folders).keys() >= ALWAYS
    told = read(folders)
    assert (told["ended"], told["error"], told["state"], told["frames"]) == ("whole", None, None, 57)
    assert "stopped" not in told and told["seconds_all"] >= told["seconds"] >= 0
    [file] = whole.ui["adastate_report_files"]
    assert file == {"filename": "take_00001_.report.json", "subfolder": "video", "type": "output"}
    stop_after(monkeypatch, 2)
    stopped = rollout(stream=stream())
    told = read(folders, "video/take_00002_.report.json")
    assert told == json.loads(stopped.args[2]) and told["ended"] == "stopped"
    assert told["stopped"] == {"frame": 21, "of": 57, "by": "user"}
    assert load_state(folders / "output" / told["state"].removesuffix(" [output]")).emitted == 6
    assert not list(folders.rglob("*.tmp"))


def test_a_rollout_without_a_stream_writes_nothing_and_says_the_same(rollout, folders):
    told = json.loads(rollout().args[2])
    assert told.keys() >= ALWAYS - {"decoder"} and (told["ended"], told["videos"], told["state"]) == ("whole", [], None)
    assert not any((folders / "output").iterdir())


def test_every_video_of_a_batch_has_the_report_of_them_all(rollout, stream, folders, monkeypatch):
    made = rollout(batch_size=2, length=21, stream=stream())
    first, second = (read(folders, f"video/take_00001_b{item}.report.json") for item in (0, 1))
    assert first == second and first["videos"] == ["video/take_00001_b0.mp4", "video/take_00001_b1.mp4"]
    assert len(made.ui["adastate_report_files"]) == 2
    raises_at(monkeypatch, HostModel, "velocity", MemoryError(), 5)
    with pytest.raises(MemoryError):
        rollout(batch_size=2, stream=stream())
    first, second = (read(folders, f"video/take_00002_b{item}.report.json") for item in (0, 1))
    assert first == second and first["ended"] == "failed" and len(first["videos"]) == 2


@pytest.mark.parametrize("where", ["load", "file", "first pass", "first decode"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()], ids=["full", "interrupt"])
def test_an_end_before_the_first_chunk_leaves_its_report_alone(rollout, stream, folders, monkeypatch, where, error):
    owner, name = {
        "load": (adapter.HostModel, "load"),
        "file": (stream_parts, "VideoSink"),
        "first pass": (HostModel, "velocity"),
        "first decode": (HostDecoder, "step"),
    }[where]
    for batch in (1, 2):
        with monkeypatch.context() as patch:
            raises_at(patch, owner, name, error)
            with pytest.raises(type(error)):
                rollout(batch_size=batch, stream=stream(filename_prefix=f"video/{batch}"))
    names = ["1_00001_.report.json", "2_00001_b0.report.json", "2_00001_b1.report.json"]
    assert sorted(path.name for path in (folders / "output" / "video").iterdir()) == names
    for name in names:
        told = read(folders, f"video/{name}")
        assert told["ended"] == ("failed" if isinstance(error, OSError) else "interrupted")
        assert told.keys() >= ALWAYS
        assert (told["videos"], told["files"], told["state"], told["frames"], told["chunks"] > 1) == (
            [],
            [],
            None,
            0,
            False,
        )
    rollout(length=9, stream=stream(filename_prefix="video/1"))
    assert read(folders, "video/1_00002_.report.json")["ended"] == "whole"
    assert read(folders, "video/1_00001_.report.json")["ended"] != "whole"


def test_a_resumed_run_that_ends_at_once_counts_from_its_state(rollout, stream, folders, monkeypatch):
    state = rollout(length=21, stream=stream()).args[1]
    before = (folders / "output/video/take_00001_.report.json").read_bytes()
    raises_at(monkeypatch, adapter.HostModel, "load", MemoryError())
    with pytest.raises(MemoryError):
        rollout(resume=state, stream=stream(join=True))
    told = read(folders, "video/take_00002_.report.json")
    assert (told["frames"], told["frames_total"], told["chunks"]) == (0, 21, 0) and "kv_bytes_used" not in told
    joined = json.loads(rollout(resume=state, stream=stream(join=True)).args[2])
    assert (joined["frames"], joined["frames_total"], joined["videos"]) == (36, 57, ["video/take_00003_.mp4"])
    assert (folders / "output/video/take_00001_.report.json").read_bytes() == before


@pytest.mark.parametrize("how", ["full", "read-only", "taken"])
@pytest.mark.parametrize("end", ["whole", "failed"])
def test_a_report_that_cannot_be_written_costs_nothing_else(rollout, stream, folders, monkeypatch, how, end, caplog):
    path, opened = folders / "output/video/take_00001_.report.json", report.whole_file

    @contextlib.contextmanager
    def refusing(target, new=False):
        if how == "full":
            raise OSError(28, "No space left on device")
        if how == "read-only":
            raise PermissionError(13, "Permission denied")
        path.write_text("mine")
        with opened(target, new) as file:
            yield file

    monkeypatch.setattr(report, "whole_file", refusing)
    if end == "failed":
        raises_at(monkeypatch, HostModel, "velocity", torch.cuda.OutOfMemoryError("out of memory"), 5)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            rollout(stream=stream())
        assert "take_00001_.report.json could not be written" in caplog.text
    else:
        made = rollout(stream=stream())
        [warning] = [one for one in json.loads(made.args[2])["warnings"] if "report.json" in one]
        assert warning.startswith("take_00001_.report.json could not be written (")
        assert "adastate_report_files" not in made.ui and made.args[3].get_frame_count() == 57
    assert (path.read_text() if path.exists() else None) == ("mine" if how == "taken" else None)
    assert not list(folders.rglob("*.tmp"))


def test_a_report_whose_writing_is_cut_off_is_written_again_or_never_was(rollout, stream, folders, monkeypatch):
    raises_at(monkeypatch, whole_file, "_publish", KeyboardInterrupt(), 2)  # the first is the video's last rewrite
    with pytest.raises(KeyboardInterrupt):
        rollout(stream=stream())
    assert read(folders)["ended"] == "interrupted" and read(folders)["frames_total"] == 57


def test_what_is_refused_before_anything_is_loaded_leaves_nothing(rollout, stream, folders, monkeypatch):
    state = rollout(length=21, stream=stream(filename_prefix="a")).args[1]
    loads = []
    monkeypatch.setattr(adapter.HostModel, "load", lambda *_: loads.append(1))
    (folders / "output" / "a_00001_.mp4").unlink()
    before = sorted(folders.rglob("*"))
    with pytest.raises(ValueError, match="is missing"):
        rollout(resume=state, stream=stream(filename_prefix="b/c", join=True))
    assert sorted(folders.rglob("*")) == before and not loads


def test_a_report_is_json_whatever_it_holds(rollout, stream, folders, monkeypatch):
    monkeypatch.setattr(
        report, "_prompts", lambda job: [{"seconds": float("nan"), "text": "\ud800", "more": (1, float("inf"))}]
    )
    rollout(stream=stream())
    assert read(folders)["prompts"] == [{"seconds": None, "text": "\ud800", "more": [1, None]}]


# ---- max_seconds


class Clock:
    """A clock of a rollout on which every pass takes ten seconds, and loading thirty."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(
            preflight, "time", SimpleNamespace(monotonic=lambda: self.now, perf_counter=time.perf_counter)
        )
        self._slow(monkeypatch, HostModel, "velocity", 10.0)
        self._slow(monkeypatch, adapter.HostModel, "load", 30.0)

    def _slow(self, monkeypatch, owner, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def slow(*given, **named):
            self.now += seconds
            return original(*given, **named)

        monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("limit", "chunks"), [(0.0, 5), (1.0, 1), (50.0, 1), (51.0, 2), (70.0, 2), (110.0, 4), (130.0, 5)]
)
@pytest.mark.sampled(2)
def test_a_rollout_stops_and_keeps_once_its_seconds_have_passed(rollout, stream, folders, monkeypatch, limit, chunks):
    """Two passes a chunk: after thirty seconds of loading the first is there at 50, the fifth at 130."""
    whole = rollout(stream=stream(filename_prefix="whole"))
    Clock(monkeypatch)
    made = rollout(stream=stream(), max_seconds=limit)
    told, frames = read(folders), 12 * chunks - 3
    assert told == json.loads(made.args[2]) and told["frames_total"] == frames
    assert frames == len(frames_of(folders / "output/video/take_00001_.mp4"))
    assert torch.equal(made.args[0]["samples"], whole.args[0]["samples"][:, :, : 3 * chunks])
    if chunks == 5:
        assert told["ended"] == "whole" and "stopped" not in told and told["state"] is None
        return
    assert told["ended"] == "stopped" and told["stopped"] == {"frame": frames, "of": 57, "by": "max_seconds"}
    assert told["seconds_all"] == 30 + 20 * chunks
    assert f"because max_seconds ({limit:g}) had passed" in " ".join(told["warnings"])
    state = load_state(folders / "output" / told["state"].removesuffix(" [output]"))
    monkeypatch.undo()
    rest = rollout(resume=state, stream=stream(join=True))
    assert torch.equal(rest.args[0]["samples"], whole.args[0]["samples"])


def test_any_video_is_made_in_runs_that_are_cut_at_once(rollout, stream, folders):
    whole = rollout(stream=stream(filename_prefix="whole"))
    state, ends = None, []
    while not ends or ends[-1] == "stopped":
        made = rollout(resume=state, stream=stream(join=state is not None), max_seconds=1e-9)
        ends.append(json.loads(made.args[2])["ended"])
        state = made.args[1]
    assert ends == 4 * ["stopped"] + ["whole"] and torch.equal(made.args[0]["samples"], whole.args[0]["samples"])


def test_it_stops_without_a_stream_and_among_start_frames_too(rollout, folders):
    start = {"samples": torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(2))}
    whole = rollout(start_latent=start)
    made = rollout(start_latent=start, max_seconds=1e-9)
    assert json.loads(made.args[2])["stopped"] == {"frame": 9, "of": 57, "by": "max_seconds"}
    rest = rollout(resume=made.args[1])
    assert torch.equal(rest.args[0]["samples"], whole.args[0]["samples"])


@pytest.mark.parametrize("value", [-1.0, 1e9, float("nan"), "soon"])
def test_seconds_that_are_none_are_refused(rollout, node, value):
    with pytest.raises(ValueError, match="max_seconds is"):
        rollout(max_seconds=value)


# ---- odd moments


class Unprintable(RuntimeError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_be_printed_has_a_report(rollout, stream, folders, monkeypatch):
    raises_at(monkeypatch, HostModel, "velocity", Unprintable(), 5)
    with pytest.raises(Unprintable):
        rollout(stream=stream())
    assert read(folders)["error"] == {"type": "internal_error", "message": "Unprintable"}
    assert read(folders).keys() >= ALWAYS


def test_a_listing_that_fails_at_the_end_costs_the_states_name_alone(rollout, stream, folders, monkeypatch):
    raises_at(monkeypatch, output.StreamOutput, "saved", PermissionError(13, "Permission denied"), 2)
    made = rollout(stream=stream())
    assert made.args[3].get_frame_count() == 57
    assert read(folders)["ended"] == "whole" and read(folders)["state"] is None


@pytest.mark.parametrize("when", ["before the first chunk", "while the report is named"])
def test_two_servers_in_one_folder_keep_to_their_own_reports(rollout, stream, folders, monkeypatch, when):
    """One fails before its first chunk while the other is about to give its video a name, or the other way round."""
    opened, reserve, started = output.StreamOutput.open, files.reserve, []

    def fails() -> None:
        with monkeypatch.context() as patch, contextlib.suppress(MemoryError):
            patch.setattr(HostModel, "load", lambda *_: (_ for _ in ()).throw(MemoryError()))
            rollout(stream=stream())

    def opening(self, progress):
        opened(self, progress)
        if not started and when == "before the first chunk":  # the number is chosen, and the video not yet named
            started.append(1)
            fails()

    def reserving(path):
        reserve(path)
        if not started and when != "before the first chunk":  # between a report's name and its look around
            started.append(1)
            with monkeypatch.context() as patch:
                patch.setattr(HostModel, "load", load)
                rollout(stream=stream())

    load = HostModel.load
    monkeypatch.setattr(output.StreamOutput, "open", opening)
    monkeypatch.setattr(files, "reserve", reserving)
    if when == "before the first chunk":
        rollout(stream=stream())
    else:
        fails()
    told = {path.name: read(folders, f"video/{path.name}") for path in (folders / "output/video").glob("*.report.json")}
    assert started and sorted(one["ended"] for one in told.values()) == ["failed", "whole"]
    [name] = [name for name, one in told.items() if one["ended"] == "whole"]
    video = name.replace(".report.json", ".mp4")
    assert told[name]["videos"] == [f"video/{video}"]
    assert [path.name for path in (folders / "output/video").glob("*.mp4")] == [video]


@pytest.mark.parametrize("prefix", ["видео/日本", "a.b/take.v2", "video/take_00007_", "video/100% sure"])
def test_a_report_has_its_videos_name_whatever_that_is(rollout, stream, folders, prefix):
    rollout(length=9, stream=stream(filename_prefix=prefix))
    [video], [report_file] = (list((folders / "output").rglob(f"*.{end}")) for end in ("mp4", "report.json"))
    assert report_file.name == video.name.removesuffix(".mp4") + ".report.json"
    assert read(folders, report_file.relative_to(folders / "output").as_posix())["videos"] == [f"{prefix}_00001_.mp4"]


@pytest.mark.parametrize("when", ["load", "decode again"])
def test_a_stop_before_the_first_chunk_keeps_one(rollout, stream, folders, monkeypatch, when):
    kept = rollout(length=21).args[1]
    runs, run = [], live.LiveRun.__init__
    monkeypatch.setattr(live.LiveRun, "__init__", lambda self, *given: (run(self, *given), runs.append(self))[0])
    owner, name = (HostModel, "load") if when == "load" else (output.StreamOutput, "_restore")
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given: (runs[-1].stop(), original(*given))[1])
    made = rollout(resume=kept, stream=stream())
    told = json.loads(made.args[2])
    assert (told["ended"], told["chunks"], told["stopped"]["frame"], told["stopped"]["by"]) == (
        "stopped",
        1,
        33,
        "user",
    )
    assert read(folders) == told
