"""Streamed runs whose settings are drawn, of every feature that one may be ended in; run_checks.py has what must be true then."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from sounds import siren
from test_absorption import DEFAULTS as ABSORPTION
from test_steering import Encoder

FEATURES = ("autosave", "transitions", "absorption", "8-bit cache", "steering", "sound")
FPS, RATE, CHUNK, HISTORY = 16.0, 16_000, 3, 3
# the least side that an encoder takes and makes the same of twice
SIDES = {"hevc": 96, "hevc_10bit": 96, "av1": 96, "av1_10bit": 96}
LOSSLESS = ("ffv1",)
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
