"""What is used where an input says auto: the number given, else the checkpoint's own metadata or preset, else a fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adastate_core.anchors import Anchor, AnchorAdaptive
from ..adastate_core.bounds import BOUNDS
from ..adastate_core.geometry import WAN21
from ..adastate_core.rope import POSITION_MODES
from ..adastate_core.schedules.schedule import Schedule
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
}
# noise levels that are one: a scheduler of the host rounds to a thousandth of its range
SAME_SIGMA = 1e-3
NOT_CAUSAL = (
    "the checkpoint says nothing of being causal: choose its system in Model Preset; if frames fall apart it may be a plain "
    "Wan model"
)


def checkpoint_anchor(defaults: dict[str, Any]) -> Anchor:
    """What a checkpoint's `state_frames` and `state_after_past` ask for; no anchor where they are not of use."""
    frames = defaults.get("state_frames")
    if type(frames) is not int or not 1 <= frames <= MOST_STATE_FRAMES:
        return Anchor()
    return AnchorAdaptive(frames, defaults.get("state_after_past") is True)


@dataclass(frozen=True)
class Resolved:
    """Settings of a rollout with nothing left at auto. `schedule_asked`: steps or shift were given as numbers."""

    numbers: dict[str, Any]
    anchor: Anchor
    preset: Preset | None
    causal: bool
    schedule_asked: bool
    passed_over: tuple[str, ...] = ()

    @property
    def schedule(self) -> Schedule:
        """The preset's own step list unless steps or shift were asked for."""
        if self.preset is not None and not self.schedule_asked:
            return self.preset.schedule
        return self._sampled(Schedule.shifted(self.numbers["steps"], self.numbers["shift"]))

    def _sampled(self, schedule: Schedule) -> Schedule:
        """With the preset's sampler."""
        return schedule if self.preset is None else replace(schedule, sampler=self.preset.sampler)

    def given_schedule(self, sigmas: Sequence[float]) -> Schedule:
        """A SIGMAS list as the schedule of every chunk, so that the rollout and the sampler node take one alike.

        Only where it is the preset's own list the preset's steps for the first chunk go with it: a SIGMAS has no room for
        them. ValueError for a list that does not fall.
        """
        given = self._sampled(Schedule.from_sigmas(sigmas))
        return replace(given, first_sigmas=self.preset.schedule.first_sigmas) if self._is_presets(given) else given

    def _is_presets(self, schedule: Schedule) -> bool:
        own = self.preset.schedule.sigmas if self.preset is not None else ()
        return len(own) == len(schedule.sigmas) and all(
            math.isclose(a, b, abs_tol=SAME_SIGMA) for a, b in zip(own, schedule.sigmas, strict=True)
        )

    def sigmas_warnings(self, schedule: Schedule) -> list[str]:
        """What may surprise about a SIGMAS that was connected."""
        if self.preset is None or not self.preset.first_timesteps or schedule.first_sigmas:
            return []
        return [
            f"sigmas is not the list of {self.preset.title}, so its {len(self.preset.first_timesteps)} steps for the first chunk "
            "are not used: every chunk has the given ones"
        ]

    def spec_options(self, sigmas: int) -> dict[str, int]:
        """What a preset adds to a RolloutSpec, for a schedule of `sigmas` steps."""
        if self.preset is None:
            return {}
        return {
            "blocks": sigmas if self.preset.blocks > 1 else 1,
            "restart_frames": self.preset.restart_frames,
            "overlap_frames": self.preset.overlap_frames,
        }

    def warnings(self, latent_length: int) -> list[str]:
        """What may surprise, a sentence each."""
        if not self.causal:
            return [NOT_CAUSAL]
        found = []
        if self.passed_over:
            found.append(
                f"the checkpoint's own settings say {', '.join(self.passed_over)}, which makes no sense here and is passed over"
            )
        preset = self.preset
        if preset is None or not preset.longer or latent_length <= preset.trained_frames:
            return found
        if self.anchor != preset.anchor:
            return found
        return [
            *found,
            f"{preset.title} was made for {preset.trained_frames} latent frames "
            f"({WAN21.pictures(preset.trained_frames)} pictures) and {latent_length} were asked for; {preset.longer}",
        ]


def preset_of(defaults: dict[str, Any] | None) -> Preset | None:
    """The preset that a checkpoint's own words name, if there is one of that name."""
    name = (defaults or {}).get("preset")
    return PRESETS.get(name) if isinstance(name, str) else None


def resolve(defaults: dict[str, Any] | None, asked: dict[str, Any], anchor: Anchor | None) -> Resolved:
    """`asked` (None where auto) and an `anchor` (None where not connected) over what the checkpoint says."""
    known = defaults or {}
    preset = preset_of(defaults)
    asked = {name: asked.get(name) for name in FALLBACK}
    stated = {name: known[name] for name, sound in _SOUND.items() if name in known and sound(known[name])}
    numbers = FALLBACK | (preset.settings() if preset else {}) | stated
    numbers = {name: numbers[name] for name in FALLBACK}
    numbers |= {name: value for name, value in asked.items() if value is not None}
    if anchor is None:
        anchor = preset.anchor if preset else checkpoint_anchor(known)
    if asked["positions"] is None and numbers["positions"] == "absolute" and anchor.relative_only:
        numbers["positions"] = "packed"
    own = preset.settings() if preset else {}
    schedule_asked = any(asked[name] is not None or stated.get(name) not in (None, own.get(name)) for name in _STEPS)
    return Resolved(numbers, anchor, preset, defaults is not None, schedule_asked, _passed_over(known))


def _passed_over(known: dict[str, Any]) -> tuple[str, ...]:
    """The settings in a checkpoint's own words that are none: a number out of its range, a preset that nobody knows."""
    sound = _SOUND | {
        "preset": lambda value: isinstance(value, str) and value in PRESETS,
        "state_frames": _whole(0, MOST_STATE_FRAMES),
        "state_after_past": lambda value: isinstance(value, bool),
    }
    odd = [name for name, is_sound in sound.items() if known.get(name) is not None and not is_sound(known[name])]
    return tuple(f"{name} {shown(known[name])}" for name in odd)
