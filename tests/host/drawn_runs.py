"""Streamed runs whose settings are drawn, and what has to be true of them wherever they end: their files play, their newest state
goes on to the bits of the run that nobody ended, and nothing is left lying about."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adastate_pack.adastate_core.rollout import RolloutState
from adastate_pack.adastate_core.states import spacing
from adastate_pack.adastate_core.states.state_thread import StateThread
from adastate_pack.adastate_core.video.encoder import CODECS
from adastate_pack.adastate_core.video.frame_formats import FRAME_FORMATS
from adastate_pack.adastate_core.video.frame_writer import FrameWriter
from adastate_pack.nodes.host import listing
from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files
from adastate_pack.nodes.host.steer_wishes import Wish
from bit_equal import decoded, differences, distance
from file_faults import Faults
from PIL import Image
from test_absorption import DEFAULTS as ABSORPTION
from test_steering import Encoder

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from sounds import around, lag, played, siren

FEATURES = ("autosave", "transitions", "absorption", "8-bit cache", "steering", "sound")
FPS, RATE, CHUNK, HISTORY = 16.0, 16_000, 3, 3
# the least side that an encoder takes and makes the same of twice
SIDES = {"hevc": 96, "hevc_10bit": 96, "av1": 96, "av1_10bit": 96}
LOSSLESS = ("ffv1",)
NEAR = 0.1  # mean difference, as a share of white
AFTER_BACK = "a river"  # words that are asked for with a way back


@dataclass(frozen=True)
class Drawn:
    """What a run is drawn to be. `codec` is empty where only `frames` are written, and the other way round."""

    codec: str
    frames: str
    chunks: int
    batch: int
    history: int
    autosave_seconds: float
    anchor: str
    keep_latents: bool
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    absorption: tuple[tuple[str, Any], ...] = ()
    timeline: str = ""
    wishes: tuple[tuple[int, Wish], ...] = ()
    sound: int = 0  # channels

    @property
    def length(self) -> int:
        """Video frames."""
        return 4 * CHUNK * self.chunks - 3

    def exact(self, path: Path) -> bool:
        """Whether a file shows what it was given, to the last bit."""
        return path.suffix == ".frames" or self.codec in LOSSLESS

    @property
    def goes_back(self) -> bool:
        """Whether what was shown once may be taken back."""
        return any(wish.take_back is not None for _, wish in self.wishes)

    @property
    def suffixes(self) -> list[str]:
        """What follows the number in the names of its files, item by item, videos first."""
        endings = ([CODECS[self.codec].suffix] if self.codec else []) + ([".frames"] if self.frames else [])
        items = [""] if self.batch == 1 else [f"b{item}" for item in range(self.batch)]
        return [f"{item}{ending}" for ending in endings for item in items]


def _files(luck: random.Random) -> tuple[str, str]:
    """A codec, a format of frames, or both; of the slower codecs fewer."""
    codecs = [name for name in CODECS for _ in range(1 if name in SIDES else 8)]
    codec, frames = luck.choice(codecs), luck.choice(list(FRAME_FORMATS))
    return luck.choice(((codec, ""), (codec, ""), (codec, ""), (codec, frames), ("", frames)))


def drawn(feature: str, luck: random.Random) -> Drawn:
    """A run that has `feature`, one of FEATURES, and by luck others that go with it."""
    codec, frames = _files(luck)
    has = {feature} | {one for one in FEATURES if luck.random() < 0.2}
    if feature == "steering" or luck.random() < 0.5:
        has -= {"absorption"} - {feature}
    more: dict[str, Any] = {}
    if "8-bit cache" in has:
        more["cache_dtype"] = luck.choice(("fp8", "int8"))
    if luck.random() < 0.25:
        more["cache_device"] = "host memory"
    if "transitions" in has:
        more["timeline"] = _timeline(luck)
    history = luck.choice((0, 0, 1, 2))
    anchor = luck.choice(("none", "static", "adaptive"))
    if "steering" in has and "absorption" not in has:
        history = history or luck.choice((0, 1))
        more["wishes"] = _wishes(luck, history if frames != "webp" else 0, anchor == "adaptive")
        more.setdefault("timeline", "0s a meadow")
    if "absorption" in has:
        more["absorption"] = tuple(_absorption(luck).items())
    if "sound" in has:
        more["sound"] = luck.choice((1, 2))
    chunks = luck.randint(6, 7) if "absorption" in has else luck.randint(4, 6)
    chunks = max(chunks, *(after + 1 for after, _ in more.get("wishes", ((0, None),))))
    return Drawn(codec, frames, chunks, luck.choice((1, 1, 1, 1, 2)), history, luck.choice((1e-9, 0.02, 0.1)), anchor,
                 luck.random() < 0.5, **more)  # fmt: skip


def _timeline(luck: random.Random) -> str:
    first, second = luck.choices(("cut", "recache", "flush", "rope cut", "soft"), k=2)
    seed, now, then = luck.choice(("", " {seed 3}")), luck.choice((0.75, 1, 1.5)), luck.choice((2.25, 2.8))
    return f"0s a meadow\n{now:g}s {{{first}}}{seed} snow\n{then:g}s {{{second}}} a lake"


def _wishes(luck: random.Random, history: int, adaptive: bool) -> tuple[tuple[int, Wish], ...]:
    """What is asked after how many chunks. The way back leads to the first or the second."""
    asked = [(1, Wish(prompt="a desert", transition=luck.choice(("cut", "recache", "soft", "flush"))))]
    asked.append((2, luck.choice((Wish(seed=7), Wish(prompt="a city", seed=2**64 - 1)))))
    if adaptive:
        asked.append((2, Wish(strength=0.25)))
    if history and luck.random() < 0.7:
        back = luck.choice((0.4, 0.8)) if history == 1 else 0.4
        asked.append((2 + history, Wish(take_back=back, prompt=AFTER_BACK)))  # when it is known that a state is kept
    return tuple(asked)


def _absorption(luck: random.Random) -> dict[str, Any]:
    return {
        "warmup_frames": luck.choice((6, 9)),
        "local_window_frames": 2,
        "ridge": "0.3",
        "scope": luck.choice(("head", "layer")),
        "select": luck.choice(("residual", "sensitivity")),
        "schedule": luck.choice(("once", "when it drifts")),
    }


class Runs:
    """Makes drawn runs, with one model, below the host's output folder. `written` are the pictures of the newest run by their
    place in the video: [B, H, W, 3]."""

    def __init__(self, node, model, vae, positive, folders: Path, patch: pytest.MonkeyPatch) -> None:
        self.node, self.model, self.vae, self.positive, self.out = node, model, vae, positive, folders / "output"
        self.folders, self.script = folders, None
        self.written: dict[int, torch.Tensor] = {}
        write = FrameWriter._write

        def keep(writer: FrameWriter, given: Any) -> None:
            pictures = given.pictures.wait().clone()
            first = _place(writer.sinks[0])
            write(writer, given)
            self.written |= {first + i: pictures[:, i] for i in range(pictures.shape[1])}

        patch.setattr(FrameWriter, "_write", keep)
        self.waits, run = False, StateThread.run

        def run_work(thread: StateThread, work: Any) -> None:
            run(thread, work)
            if self.waits and thread._thread is not None:
                thread._thread.join()

        patch.setattr(StateThread, "run", run_work)

    def __call__(self, drawn: Drawn, name: str, resume: RolloutState | None = None, timeline: str = "") -> Any:
        """The node's outputs for a run into the folder `name`, which is steered where it begins anew. `timeline`: one to take
        instead of its own."""
        self.written.clear()
        self.script.acts.clear()
        self.waits = drawn.goes_back  # how far depends on what is kept by then
        for chunk, wish in drawn.wishes if resume is None else ():
            self.script.at(chunk, wish)
        positive = self._words(timeline or drawn.timeline)
        side = SIDES.get(drawn.codec, 32)
        inputs = {
            "model": self.model, "positive": positive, "width": side, "height": side, "length": drawn.length, "seed": 5,
            "batch_size": drawn.batch, "steps": 1 if side > 32 else 2, "shift": 5.0, "chunk_frames": CHUNK, "positions": "packed",
            "window_frames": 12 if drawn.absorption else 3, "keep_latents": drawn.keep_latents, "anchor": self._anchor(drawn),
            "cache_dtype": drawn.cache_dtype, "cache_device": drawn.cache_device, "stream": self._stream(drawn, name),
            "resume": resume,
        }  # fmt: skip
        if drawn.absorption:
            inputs["absorption"] = self.node("AdaStateAbsorption")(**(ABSORPTION | dict(drawn.absorption))).args[0]
        return self.node("AdaStateRollout")(**inputs)

    def _words(self, timeline: str) -> Any:
        if not timeline:
            return self.positive
        return self.node("AdaStatePromptTimeline")(clip=Encoder(), text=timeline, live=True, shared="film of {}").args[
            0
        ]

    def _anchor(self, drawn: Drawn) -> Any:
        if drawn.anchor == "none":
            return None
        if drawn.anchor == "adaptive":
            return self.node("AdaStateAnchorAdaptive")(state_frames=1).args[0]
        return self.node("AdaStateAnchorStatic")(sink_frames=2).args[0]

    def _stream(self, drawn: Drawn, name: str) -> Any:
        sound = siren(RATE, drawn.length / FPS, drawn.sound) if drawn.sound else None
        audio = None if sound is None else {"waveform": torch.from_numpy(sound)[None], "sample_rate": RATE}
        kept = {
            "autosave_seconds": drawn.autosave_seconds,
            "history_chunks": drawn.history,
            "history_states": HISTORY,
            "audio": audio,
        }
        stream = None
        if drawn.codec:
            stream = self.node("AdaStateStreamOutput")(
                vae=self.vae, filename_prefix=f"{name}/take", fps=FPS, codec=drawn.codec, quality=18, preview=False,
                join=True, **kept,
            ).args[0]  # fmt: skip
        if not drawn.frames:
            return stream
        beside = {"vae": self.vae, **kept} if stream is None else {"stream": stream}
        prefix = f"{name}/stills/take" if drawn.codec else f"{name}/take"
        return self.node("AdaStateStreamFrames")(
            filename_prefix=prefix, format=drawn.frames, fps=FPS, preview=False, join=True, **beside
        ).args[0]

    # ---- what there is to see of a run

    def path(self, name: str, number: int, suffix: str, drawn: Drawn) -> Path:
        inner = "stills" if suffix.endswith(".frames") and drawn.codec else ""
        return self.out / name / inner / f"take_{number:05}_{suffix}"

    def files(self, drawn: Drawn, name: str, number: int) -> list[Path]:
        """The videos and folders of frames of one number."""
        return [self.path(name, number, suffix, drawn) for suffix in drawn.suffixes]

    def newest_state(self) -> str | None:
        """As a server that was just started lists it first, if at all."""
        listing._listings.clear()
        return next(iter(saved_files(STATE_SUFFIX)), None)

    def loaded(self, name: str, chunk: int = -1) -> RolloutState:
        """As a user loads it, who is told how it was steered."""
        loaded = self.node("AdaStateLoadState")(file=name, chunk=chunk)
        state = loaded.args[0]
        assert loaded.ui.value.endswith(state.steered.get("timeline") or loaded.ui.value)
        return state

    def clear(self) -> None:
        """An output folder as at first."""
        for path in self.out.iterdir():
            shutil.rmtree(path)


def _place(sink: Any) -> int:
    """The place in the video of the next picture that a sink is given."""
    sink = sink.sinks[0] if hasattr(sink, "sinks") else sink
    return sink.next_frame if hasattr(sink, "next_frame") else sink._sent


@dataclass(frozen=True)
class Whole:
    """A run that nobody ended, and the seconds that it took. `points` are its operations on files, `timeline` how it was steered in
    the end, and `back` the chunk that it went back to."""

    drawn: Drawn
    seconds: float
    latents: torch.Tensor | None
    state: RolloutState
    pictures: dict[int, torch.Tensor]
    shown: tuple[tuple[numpy.ndarray, ...], ...]  # of each file
    points: tuple[tuple[str, int], ...]
    timeline: str
    back: int


def whole_run(runs: Runs, drawn: Drawn, counting: Faults) -> Whole:
    """Make it, and clear it away."""
    start = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        counting.install(patch)
        outputs = runs(drawn, "whole").args
    seconds = time.monotonic() - start
    shown = tuple(tuple(shown_of(path, drawn)) for path in runs.files(drawn, "whole", 1))
    assert {len(each) for each in shown} == {drawn.length} == {len(runs.written)}
    steering = json.loads(outputs[2]).get("steering", {"done": [], "timeline": ""})
    assert not [one for one in steering["done"] if "error" in one], steering
    back = [one["taken_back"]["chunk"] for one in steering["done"] if "taken_back" in one]
    assert bool(back) == drawn.goes_back, f"it went back to {back}: {steering}"
    latents = outputs[0]["samples"] if drawn.keep_latents else None
    points = tuple(place for place, _ in counting.points)
    made = Whole(
        drawn,
        seconds,
        latents,
        outputs[1],
        dict(runs.written),
        shown,
        points,
        steering["timeline"],
        min(back, default=0),
    )
    runs.clear()
    return made


def go_on(runs: Runs, whole: Whole, name: str, listed: str | None) -> tuple[Any, RolloutState | None]:
    """The node's outputs for a run that goes on from a state as it is `listed`, or begins anew, and the state; None for outputs if
    it is that of the whole video. Of a steered run it takes the timeline that the state tells; of a state from before the last
    change, that of the whole. Where that one went back, such a state may be behind what stayed: then the run goes on from its
    history."""
    drawn, timeline = whole.drawn, ""
    state = runs.loaded(listed) if listed else None
    if state is not None and drawn.wishes:
        changed = state.next_chunk > drawn.wishes[-1][0] or drawn.goes_back and AFTER_BACK in str(state.steered)
        timeline = changed and state.steered.get("timeline") or whole.timeline  # where it was joined, it told all
        if drawn.goes_back and AFTER_BACK not in str(state.steered):
            timeline = whole.timeline
            if state.next_chunk > whole.back:
                state = runs.loaded(listed, whole.back)
    return None if is_whole(whole, state) else runs(drawn, name, state, timeline).args, state


def shown_of(path: Path, drawn: Drawn) -> Iterator[numpy.ndarray]:
    """The pictures of a video or of a folder of frames, in order, each [H, W, 3]. Whatever does not decode raises."""
    if path.suffix != ".frames":
        yield from decoded(path)
    elif FRAME_FORMATS[drawn.frames].animated:
        with Image.open(path / f"000000{FRAME_FORMATS[drawn.frames].suffix}") as image:
            for number in range(image.n_frames):
                image.seek(number)
                yield numpy.asarray(image.convert("RGB"))
    else:
        for number, each in enumerate(sorted(path.glob(f"*{FRAME_FORMATS[drawn.frames].suffix}"))):
            assert int(each.stem) == number, f"{each.name} stands where frame {number} belongs"
            (picture,) = decoded(each)
            yield picture


def require_begun(whole: Whole, paths: list[Path], least: int) -> list[int]:
    """How many frames each file of an ended run shows: at least `least`, less the newest of a video, and each as in the whole, but
    where the run goes back."""
    found = []
    for path, wanted in zip(paths, whole.shown, strict=True):
        shown = list(shown_of(path, whole.drawn)) if has_pictures(path) else []
        missing = least - (path.suffix != ".frames") - len(shown)
        assert missing <= 0, f"{path.name} shows {len(shown)} of {least} frames"
        if not whole.drawn.goes_back:
            require_as_wanted(path, shown, wanted, len(shown))
        found.append(len(shown))
    return found


def require_as_wanted(path: Path, shown: list[numpy.ndarray], wanted: tuple[numpy.ndarray, ...], exact: int) -> None:
    """The first `exact` frames to the bit, and those behind them nearly: an encoder that has just begun gives them other bits."""
    most = [0.0 if i < exact else NEAR for i in range(len(shown))]
    far = {i: distance(one, two) for i, (one, two) in enumerate(zip(shown, wanted, strict=False))}
    far = {i: round(value, 4) for i, value in far.items() if value > most[i]}
    assert not far, f"frames of {path.name} are others: {far}, of which {exact} are to be the same"


def has_pictures(path: Path) -> bool:
    """Whether it is there with anything in it; an animation of no picture is none yet."""
    if path.suffix != ".frames":
        return path.is_file()
    return path.is_dir() and any(each.suffix in (".png", ".tiff", ".exr") or _animated(each) for each in path.iterdir())


def _animated(path: Path) -> bool:
    return path.suffix == ".webp" and b"ANMF" in path.read_bytes()


def is_whole(whole: Whole, state: RolloutState | None) -> bool:
    """Whether nothing is left to be made: the run ended just before its state was cleared away."""
    return state is not None and state.emitted == whole.state.emitted


def require_all_there(runs: Runs, whole: Whole, state: RolloutState) -> None:
    """A state behind the last frame is that of the whole, and its files show all."""
    bad = [name for name in differences(state, whole.state) if name != "steered" or not whole.drawn.wishes]
    assert not bad, f"of the last state differ: {', '.join(bad)}"
    names = (*state.stream.get("files", []), *state.stream.get("frame_folders", []))
    for name, wanted in zip(names, whole.shown, strict=True):
        shown = list(shown_of(runs.out / name, whole.drawn))
        assert len(shown) == whole.drawn.length, f"{name} shows {len(shown)} frames of {whole.drawn.length}"
        require_as_wanted(runs.out / name, shown, wanted, 0)


def require_gone_on(runs: Runs, whole: Whole, outputs: Any, state: RolloutState | None, again: bool = False) -> None:
    """A run that went on from `state`, or from nothing, is the whole one: latents, state, pictures, files. `again`: what is joined
    to was joined itself."""
    if outputs is None:
        require_all_there(runs, whole, state)
        return
    drawn, before, report = whole.drawn, 0 if state is None else state.emitted * 4 - 3, json.loads(outputs[2])
    if whole.latents is not None:
        assert torch.equal(outputs[0]["samples"], whole.latents), "the latents are others"
    bad = [name for name in differences(outputs[1], whole.state) if name != "steered" or not drawn.wishes]
    assert not bad, f"of the state differ: {', '.join(bad)}"
    assert set(runs.written) >= set(range(before, drawn.length)), "not all of the rest was made"
    bad = [place for place, made in runs.written.items() if not torch.equal(made, whole.pictures[place])]
    assert not bad, f"the pictures {bad} are others"
    paths = [runs.out / name for name in (*report.get("videos", []), *report.get("frame_folders", []))]
    for path, wanted in zip(paths, whole.shown, strict=True):
        shown = list(shown_of(path, drawn))
        assert len(shown) == drawn.length, f"{path.name} shows {len(shown)} frames of {drawn.length}"
        copied = 0 if again else before
        require_as_wanted(path, shown, wanted, drawn.length if drawn.exact(path) or state is None else copied)
        if drawn.sound and path.suffix != ".frames":
            require_sound(path, drawn)


def require_sound(path: Path, drawn: Drawn) -> None:
    """A whole video carries its sound, in step."""
    found, rate = played(path)
    wanted = around(siren(RATE, drawn.length / FPS, drawn.sound).astype(float), rate, 0, found.shape[1])
    assert rate == RATE and 0 <= found.shape[1] / rate - drawn.length / FPS < 1024 / rate + 0.001
    assert lag(found[0], wanted[0]) == 0, "the sound is late"


def require_no_litter(runs: Runs, drawn: Drawn, name: str) -> None:
    """After runs that were ended and one that went on to its end: their files, states and reports, and nothing else
    in any of the host's folders."""
    folder, item = runs.out / name, "b0" if drawn.batch > 1 else ""
    reports = (each.partition(".")[0] + ".report.json" for each in drawn.suffixes)
    beside = (*drawn.suffixes, *reports, *(f"{item}{end}" for end in (".history", STATE_SUFFIX)))
    known = re.compile(rf"take_[0-9]{{5}}_({'|'.join(map(re.escape, beside))})")
    found = [each for each in folder.rglob("*") if not _inside(each, (".history", ".frames"))]
    left = [each.name for each in found if not known.fullmatch(each.name) and each != folder / "stills"]
    assert not left, f"left are {left}"
    hidden = [each.name for each in runs.folders.rglob("*") if each.name.startswith(".") or each.name.endswith(".tmp")]
    assert not hidden, f"left are {hidden}"
    assert not any((runs.folders / "temp").iterdir()) and {each.name for each in runs.out.iterdir()} == {name}
    for each in runs.out.rglob("*.history"):
        assert len(list(each.iterdir())) <= HISTORY, f"{each.name} holds {[one.name for one in each.iterdir()]}"


def _inside(path: Path, suffixes: tuple[str, ...]) -> bool:
    return any(parent.suffix in suffixes for parent in path.parents)


@pytest.fixture
def streamed(node, model, vae, positive, folders, monkeypatch, script, every_autosave) -> Iterator[Runs]:
    """Runs in this process on one thread, as a process that is forked from it can have, with autosaves as they come."""
    every_autosave.undo()
    monkeypatch.setattr(spacing, "SHARE", float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Runs(node, model, vae, positive, folders, monkeypatch)
    made.script = script
    yield made
    torch.set_num_threads(threads)
