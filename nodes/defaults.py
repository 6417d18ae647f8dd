"""What is used where an input says auto: the number given, else the checkpoint's own metadata or preset, else a fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adastate_core.anchors import Anchor, AnchorAdaptive
from ..adastate_core.audio.driving import ALIGNMENTS
from ..adastate_core.bounds import BOUNDS
from ..adastate_core.geometry import WAN21, LatentSpace
from ..adastate_core.given import BEFORE, STARTS
from ..adastate_core.history import CLEAN, HISTORIES, OWN_LEVEL
from ..adastate_core.rope import POSITION_MODES
from ..adastate_core.schedules.schedule import Schedule
from ..adastate_core.schedules.solvers import RENOISING, SAMPLERS
from ..adastate_core.spec import ENDINGS
from ..adastate_core.weights.presets import PRESETS, Preset
from .host.node import shown

MOST_STATE_FRAMES = 16
FALLBACK = {"steps": 4, "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "packed"}
_STEPS = ("steps", "shift")


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


# what a file may say: others' files can say anything, and what makes no sense is passed over
_SOUND: dict[str, Callable[[Any], bool]] = {
    **{name: BOUNDS[name].holds for name in ("steps", "shift", "chunk_frames", "window_frames")},
    "positions": lambda value: isinstance(value, str) and value in POSITION_MODES,
    "fps": BOUNDS["fps"].holds,
}
_ENDING: Callable[[Any], bool] = lambda value: isinstance(value, str) and value in ENDINGS  # noqa: E731
_SAMPLER: Callable[[Any], bool] = lambda value: isinstance(value, str) and value in SAMPLERS  # noqa: E731
_ROLLS = _whole(0, 10**6)
_HISTORY: Callable[[Any], bool] = lambda value: isinstance(value, str) and value in HISTORIES  # noqa: E731
_AUDIO: Callable[[Any], bool] = lambda value: isinstance(value, str) and value in ALIGNMENTS  # noqa: E731
_START: Callable[[Any], bool] = lambda value: isinstance(value, str) and value in STARTS  # noqa: E731
# noise levels that are one: a scheduler of the host rounds to a thousandth of its range
SAME_SIGMA = 1e-3
NOT_CAUSAL = (
    "the checkpoint says nothing of being causal: choose its system in Model Preset; if frames fall apart it may be a plain "
    "Wan model"
)


def model_fps(defaults: dict[str, Any] | None, space: LatentSpace) -> float:
    """The frames a second that a model makes: what its file says, else its preset, else those of its latent space."""
    stated, preset = (defaults or {}).get("fps"), preset_of(defaults)
    if _SOUND["fps"](stated):
        return float(stated)
    return (preset.fps if preset is not None else 0.0) or space.fps


def checkpoint_anchor(defaults: dict[str, Any]) -> Anchor:
    """What a checkpoint's `state_frames` and `state_after_past` ask for; no anchor where they are not of use."""
    frames = defaults.get("state_frames")
    if type(frames) is not int or not 1 <= frames <= MOST_STATE_FRAMES:
        return Anchor()
    return AnchorAdaptive(frames, defaults.get("state_after_past") is True)


@dataclass(frozen=True)
class Resolved:
    """Settings of a rollout with nothing left at auto. `schedule_asked`: steps or shift were given as numbers. `start`: where given
    latents stand, one of given.STARTS, if nobody says it. `history`, `audio` and `reference_rolls` are as in a Preset."""

    numbers: dict[str, Any]
    anchor: Anchor
    preset: Preset | None
    causal: bool
    schedule_asked: bool
    passed_over: tuple[str, ...] = ()
    ending: str = ENDINGS[0]
    remade: str = ""
    sampler: str = RENOISING
    start: str = BEFORE
    history: str = CLEAN
    audio: str = ALIGNMENTS[0]
    reference_rolls: int = 0

    @property
    def schedule(self) -> Schedule:
        """The preset's own step list unless steps or shift were asked for."""
        if self.preset is not None and not self.schedule_asked:
            return self._sampled(self.preset.schedule)
        return self._sampled(Schedule.shifted(self.numbers["steps"], self.numbers["shift"]))

    def _sampled(self, schedule: Schedule) -> Schedule:
        """With the sampler that is used."""
        return replace(schedule, sampler=self.sampler)

    def given_schedule(self, sigmas: Sequence[float]) -> Schedule:
        """A SIGMAS list as the schedule of every chunk, so that the rollout and the sampler node take one alike.

        Only where it is the preset's own list the preset's steps for the first chunk go with it, and what it tells the model: a
        SIGMAS has no room for them. ValueError for a list that does not fall.
        """
        given = self._sampled(Schedule.from_sigmas(sigmas))
        if not self._is_presets(given):
            return given
        own = self.preset.schedule
        if (
            self.sampler != RENOISING
        ):  # which may weigh levels by signal over noise, where a thousandth at the first one is much
            return self._sampled(own)
        return replace(given, first_sigmas=own.first_sigmas, told=own.told)

    def _is_presets(self, schedule: Schedule) -> bool:
        own = self.preset.schedule.sigmas if self.preset is not None else ()
        return len(own) == len(schedule.sigmas) and all(
            math.isclose(a, b, abs_tol=SAME_SIGMA) for a, b in zip(own, schedule.sigmas, strict=True)
        )

    def sigmas_warnings(self, schedule: Schedule) -> list[str]:
        """What may surprise about a SIGMAS that was connected."""
        if self.preset is not None and self.preset.schedule.told and not schedule.told:
            return [
                f"sigmas is not the list of {self.preset.title}, so the model is told these noise levels and not the timesteps "
                "that its system tells it"
            ]
        if self.preset is None or not self.preset.first_timesteps or schedule.first_sigmas:
            return []
        return [
            f"sigmas is not the list of {self.preset.title}, so its {len(self.preset.first_timesteps)} steps for the first chunk "
            "are not used: every chunk has the given ones"
        ]

    def spec_options(self, sigmas: int) -> dict[str, Any]:
        """What a preset adds to a RolloutSpec, for a schedule of `sigmas` steps."""
        history = {"history": self.history, "windows": sigmas if self.history == OWN_LEVEL else 1}
        if self.preset is None:
            return history
        blocks = sigmas if self.preset.blocks > 1 else 1
        shares = self.preset.shares_window and blocks > 1 and not self.room_missing(blocks)
        return history | {
            "blocks": blocks,
            "restart_frames": self.preset.restart_frames,
            "overlap_frames": self.preset.overlap_frames,
            "one_pass_recache": self.preset.one_pass_recache,
            "remade": self.remade,
            **({"shares_window": True, "ending": self.ending} if shares else {}),
        }

    def room_missing(self, blocks: int) -> int:
        """How many frames a window lacks that so many chunks at once are to share."""
        needed = self.anchor.frames + (blocks - 1) * self.numbers["chunk_frames"]
        return max(0, needed - self.numbers["window_frames"])

    def not_shared(self, blocks: int) -> str:
        """Why the chunks of a preset that share the window's room do not, a sentence."""
        least = self.numbers["window_frames"] + self.room_missing(blocks)
        return (
            f"window_frames is {self.numbers['window_frames']}: {self.preset.title}'s own rule takes {least} or more, so every "
            "pass reads the whole window, and the video ends open"
        )

    def warnings(self, latent_length: int | None) -> list[str]:
        """What may surprise about a video of so many latent frames (None: one without an end), a sentence each."""
        if not self.causal:
            return [NOT_CAUSAL]
        found = []
        if self.passed_over:
            found.append(
                f"the checkpoint's own settings say {', '.join(self.passed_over)}, which makes no sense here and is passed over"
            )
        preset = self.preset
        if preset is None or not preset.longer or self.anchor != preset.anchor:
            return found
        if self.numbers["positions"] == preset.longer_positions:
            return found
        if latent_length is not None and latent_length <= preset.trained_frames:
            return found
        asked = "a video without an end was" if latent_length is None else f"{latent_length} were"
        return [
            *found,
            f"{preset.title} was made for {preset.trained_frames} latent frames "
            f"({WAN21.pictures(preset.trained_frames)} pictures) and {asked} asked for; {preset.longer}",
        ]


def as_before(
    defaults: dict[str, Any] | None, asked: dict[str, Any], resumed: dict[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """(`asked`, what is to be told) for going on from a state's spec `resumed`: one whose chunks under way did not share the
    window's room goes on with its own window, and open."""
    preset = preset_of(defaults)
    if preset is None or not preset.shares_window or not resumed or resumed.get("shares_window"):
        return asked, ""
    if resumed.get("blocks", 1) == 1:
        return asked, ""
    if asked["window_frames"] is None:
        asked = asked | {"window_frames": resumed.get("window_frames")}
    return asked, (
        f"in the state every pass reads all {asked['window_frames']} frames of the window, as before {preset.title}'s published "
        "rule was built in; it goes on so, and ends open"
    )


def cached_instead(
    defaults: dict[str, Any] | None,
    asked: dict[str, Any],
    anchor: Anchor | None,
    absorbs: bool,
    resumed: dict[str, Any] | None,
) -> tuple[dict[str, Any] | None, dict[str, Any], str]:
    """(`defaults`, `asked`, what is to be told) where the past that a preset makes anew before every chunk is cached from chunk to
    chunk instead: with what does not go with the other, and for going on from a state's spec `resumed` that was made so."""
    preset = preset_of(defaults)
    if preset is None or preset.cached is None:
        return defaults, asked, ""
    before = resumed is not None and not resumed.get("remade")
    found = {
        "this anchor": anchor is not None and type(anchor) is not Anchor,
        "absorption": absorbs,
        "absolute positions": asked["positions"] == "absolute",
    }
    found = [name for name, there in found.items() if there]
    if not before and not found:
        return defaults, asked, ""
    own, cached = preset.settings(), preset.cached.settings()
    changed = {name: cached[name] for name in cached if defaults.get(name) == own[name]}
    if not before:
        listed = " and ".join(found)
        told = (
            f"{listed} and a past that is made anew before every chunk do not go together, so {preset.title}'s is cached from "
            f"chunk to chunk; for its published rule leave out {listed}"
        )
        return defaults | changed | {"cached": True}, asked, told
    for name in ("window_frames", "positions"):
        if asked[name] is None:
            asked = asked | {name: resumed.get(name)}
    told = f"the state's past was cached from chunk to chunk, as before {preset.title}'s published rule was built in; it goes on so"
    return defaults | changed | {"cached": True}, asked, told


def preset_of(defaults: dict[str, Any] | None) -> Preset | None:
    """The preset that a checkpoint's own words name, if there is one of that name."""
    name, cached = (defaults or {}).get("preset"), (defaults or {}).get("cached") is True
    preset = PRESETS.get(name) if isinstance(name, str) else None
    return preset.cached if cached and preset is not None and preset.cached is not None else preset


def resolve(
    defaults: dict[str, Any] | None, asked: dict[str, Any], anchor: Anchor | None, resumed: dict[str, Any] | None = None
) -> Resolved:
    """`asked` (None where auto) and an `anchor` (None where not connected) over what the checkpoint says. `resumed` is the spec of
    the state that is gone on from."""
    known = defaults or {}
    preset = preset_of(defaults)
    asked = {name: asked.get(name) for name in FALLBACK}
    stated = {name: known[name] for name, sound in _SOUND.items() if name in known and sound(known[name])}
    numbers = FALLBACK | (preset.settings() if preset else {}) | stated
    numbers = {name: numbers[name] for name in FALLBACK}
    numbers |= {name: value for name, value in asked.items() if value is not None}
    if anchor is None:
        anchor = preset.anchor if preset else checkpoint_anchor(known)
    if asked["positions"] is None and ("positions" not in stated or numbers["positions"] == "absolute"):
        numbers["positions"] = _positions(numbers["positions"], anchor, preset, resumed)
    own = preset.settings() if preset else {}
    schedule_asked = any(asked[name] is not None or stated.get(name) not in (None, own.get(name)) for name in _STEPS)
    ending = known["ending"] if _ENDING(known.get("ending")) else ENDINGS[0]
    remade = preset.remade if preset is not None else ""
    if remade and known.get("keep_first_frame") is True:
        remade = "first"
    sampler = preset.sampler if preset is not None else RENOISING
    start = preset.start if preset is not None else BEFORE
    heard = {"history": (_HISTORY, CLEAN), "audio": (_AUDIO, ALIGNMENTS[0]), "reference_rolls": (_ROLLS, 0)}
    heard = {
        name: known[name] if is_sound(known.get(name)) else getattr(preset, name, fallback)
        for name, (is_sound, fallback) in heard.items()
    }
    return Resolved(
        numbers, anchor, preset, defaults is not None, schedule_asked, _passed_over(known), ending, remade,
        sampler=known["sampler"] if _SAMPLER(known.get("sampler")) else sampler,
        start=known["start"] if _START(known.get("start")) else start, **heard,
    )  # fmt: skip


def _positions(said: str, anchor: Anchor, preset: Preset | None, resumed: dict[str, Any] | None) -> str:
    """`said` by a preset or the fallback, unless the anchor asks for something else.

    With a hidden state every chunk has the same positions, the first one included, unless a state of before had `packed` ones.
    """
    if anchor.state_frames and (preset is None or preset.anchor != anchor):
        return "packed" if (resumed or {}).get("positions") == "packed" else "fixed"
    return "packed" if said == "absolute" and anchor.relative_only else said


def _passed_over(known: dict[str, Any]) -> tuple[str, ...]:
    """The settings in a checkpoint's own words that are none: a number out of its range, a preset that nobody knows."""
    sound = _SOUND | {
        "preset": lambda value: isinstance(value, str) and value in PRESETS,
        "state_frames": _whole(0, MOST_STATE_FRAMES),
        "state_after_past": lambda value: isinstance(value, bool),
        "ending": _ENDING,
        "sampler": _SAMPLER,
        "start": _START,
        "history": _HISTORY,
        "audio": _AUDIO,
        "reference_rolls": _ROLLS,
        "keep_first_frame": lambda value: isinstance(value, bool),
    }
    odd = [name for name, is_sound in sound.items() if known.get(name) is not None and not is_sound(known[name])]
    return tuple(f"{name} {shown(known[name])}" for name in odd)
