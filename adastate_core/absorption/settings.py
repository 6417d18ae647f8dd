"""What the absorption of a rollout is asked to do, and when; checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

PHASES = ("warming", "switched", "nothing to absorb")
SCOPES = ("head", "layer", "lowrank")
REFRESHES = ("never", "drift", "always")
SELECTIONS = ("sensitivity", "residual", "discrepancy", "explained", "saved")
# when the warm-up ends: at its length, when the cache would outgrow its budget, or when more of it no longer helps
SWITCHES = ("fixed", "memory", "learned")
# how an automatic ridge is chosen: on a chunk apart from those that it was fitted on; in states of before on the one next to them
JUDGES = ("apart", "next")
# tried from right to left, so that doing nothing wins ties (measured: smaller ridges overfit what is near in time)
RIDGES = (0.3, 1.0, 3.0, 10.0, math.inf)
RIDGES_BEFORE = (0.03, 0.1, *RIDGES)
# where too few chunks are collected to choose on one apart from the others
SHORT = (1.0, math.inf)
# so many have to be collected: two to fit on, one between, one to judge on
LEAST_APART = 4
# how many of the newest chunks a new solve gets, in addition to all that were collected before
REFRESH_CHUNKS = 4


@dataclass(frozen=True)
class AbsorptionSettings:
    """ISPA (arXiv 2607.00712) as this pack reads it; latent frames throughout.

    After `warmup_frames`, floor(`ratio` * layers) layers are switched: those whose history is best absorbed. A switched layer keeps
    only the first `sink_frames` frames (less those that the anchor holds), the newest `local_window_frames`, and the chunk
    being made. `ridge`: a number, or None to choose from RIDGES on held-out rows, as `judge` says. `absorb` off is the paper's No
    Absorb: the same as an infinite ridge.

    `monitor_layers` of the switched layers (-1: all) keep their history in host memory. Every `monitor_chunks` chunks their
    residual is measured again. They may then be solved anew: with `refresh` "always" each time, with "drift" only if the
    residual is more than `drift` times what it was at the switch. A new solve uses all that has been collected, with the newest
    REFRESH_CHUNKS chunks. The last chunk is held out. On it the new correction has to be better than the old one and better
    than none.

    `select`, one of SELECTIONS, says which layers absorb best: those without whose history the picture changes least
    ("sensitivity", sensitivity.py), those with the least error left, with the least to absorb, with most of it explained, or
    (of "saved") those that come first in `saved_layers`.

    `prior`: the fingerprint of the prior that corrections are drawn towards (prior.py), "" without one.

    `switch` says when the warm-up ends: "fixed" after `warmup_frames`; "memory" as late as cache and statistics stay within
    `budget_gib` GiB of the device (0: not known yet); "learned" when the held-out error no longer falls, at the latest after
    `most_warmup_frames` (0: twice `warmup_frames`). It never ends before `warmup_frames`.
    """

    ratio: float = 0.5
    warmup_frames: int = 24
    local_window_frames: int = 6
    sink_frames: int = 1
    ridge: float | None = None
    scope: str = "head"
    rank: int = 64
    select: str = "sensitivity"
    absorb: bool = True
    monitor_layers: int = 0
    monitor_chunks: int = 8
    refresh: str = "never"
    drift: float = 1.5
    saved_layers: tuple[int, ...] = ()
    judge: str = "apart"
    prior: str = ""
    switch: str = "fixed"
    budget_gib: float = 0.0
    most_warmup_frames: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"ratio is {self.ratio}; it must lie between 0 (no layer) and 1 (all layers)")
        least = {
            "warmup_frames": (self.warmup_frames, 1),
            "local_window_frames": (self.local_window_frames, 0),
            "sink_frames": (self.sink_frames, 0),
            "rank": (self.rank, 1),
            "monitor_layers": (self.monitor_layers, -1),
            "monitor_chunks": (self.monitor_chunks, 1),
            "most_warmup_frames": (self.most_warmup_frames, 0),
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}; it must be a number of at least 0, or auto")
        if not self.drift >= 0:
            raise ValueError(f"drift is {self.drift}; it must be at least 0")
        choices = (
            ("scope", SCOPES),
            ("select", SELECTIONS),
            ("refresh", REFRESHES),
            ("judge", JUDGES),
            ("switch", SWITCHES),
        )
        for name, value, known in ((name, getattr(self, name), known) for name, known in choices):
            if value not in known:
                raise ValueError(f"{name} is {value!r:.60}; it must be one of {', '.join(known)}")
        if (self.select == "saved") != bool(self.saved_layers):
            raise ValueError(
                "select saved takes the layers of a saved absorption: connect one to saved_layers"
                if self.select == "saved"
                else f"saved_layers are given and select is {self.select!r}: choose saved, or leave them out"
            )
        if any(i < 0 for i in self.saved_layers) or len(set(self.saved_layers)) != len(self.saved_layers):
            raise ValueError(f"saved_layers are {list(self.saved_layers)}; they must be layers from 0 on, each once")
        if self.refresh != "never" and not self.monitor_layers:
            raise ValueError(
                f"refresh {self.refresh} needs layers that keep their history: give monitor_layers, -1 for all"
            )
        self._check_prior_and_switch()

    def _check_prior_and_switch(self) -> None:
        if self.prior and not self.absorb:
            raise ValueError("a prior does nothing with absorb off: turn absorb on, or leave the prior out")
        if not 0 <= self.budget_gib < math.inf:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be a number of GiB, or 0 for what is free")
        if self.switch != "learned":
            return
        if not self.absorb or (self.ridge is not None and math.isinf(self.ridge) and not self.prior):
            raise ValueError(
                "switch when it stopped learning needs something that learns: turn absorb on and give a finite ridge, or switch "
                "after the warm-up"
            )
        if 0 < self.most_warmup_frames < self.warmup_frames:
            raise ValueError(
                f"most_warmup_frames is {self.most_warmup_frames}; it must be at least warmup_frames, {self.warmup_frames}, or 0 "
                "for twice that"
            )

    def pinned(self, anchor_frames: int) -> int:
        """How many sink frames a layer has to keep itself, because the anchor does not hold them."""
        return max(0, self.sink_frames - anchor_frames)

    def layers(self, count: int) -> int:
        """K, how many of `count` layers are switched."""
        return math.floor(self.ratio * count + 1e-9)

    def selection_passes(self, count: int) -> int:
        """How many passes of the model it takes, once, to choose among `count` layers: one without a change, and one a layer. None
        where the choice asks for none."""
        return count + 1 if self.select == "sensitivity" and 0 < self.layers(count) < count else 0

    def check_layers(self, count: int) -> None:
        """ValueError, in a sentence, if `saved_layers` cannot be those of a model of `count` layers."""
        if any(i >= count for i in self.saved_layers):
            raise ValueError(
                f"saved_layers name layer {max(self.saved_layers)} and the model has {count}: they are another checkpoint's"
            )
        if self.saved_layers and self.layers(count) > len(self.saved_layers):
            raise ValueError(
                f"ratio {self.ratio} of {count} layers are {self.layers(count)}, and saved_layers name {len(self.saved_layers)}: "
                "give a smaller ratio, or an absorption that was saved with a larger one"
            )

    @property
    def measured_chunks(self) -> int:
        """How many of every `monitor_chunks` chunks are collected: those at the end."""
        return 1 if self.refresh == "never" else min(REFRESH_CHUNKS, self.monitor_chunks)

    @property
    def longest_frames(self) -> int:
        """Latent frames after which a warm-up of "learned" ends at the latest."""
        return self.most_warmup_frames or 2 * self.warmup_frames

    @property
    def apart(self) -> bool:
        """Whether a chunk lies between those to fit on and the one to judge on: where a ridge is chosen, or learning is watched."""
        choosing = self.absorb and self.ridge is None and self.judge == "apart"
        return choosing or self.switch == "learned"

    def ridges(self, chunks: int) -> tuple[float, ...]:
        """Candidates, from the largest down, where so many `chunks` are collected."""
        if not self.absorb:
            return (math.inf,)
        if self.ridge is not None:
            return (self.ridge,)
        if self.judge == "next":
            return tuple(reversed(RIDGES_BEFORE))
        return tuple(reversed(RIDGES if chunks >= LEAST_APART else SHORT))

    def describe(self) -> dict[str, Any]:
        """JSON-able; equal descriptions mean equal behaviour. What settings of before do not name is left out where it is as
        theirs."""
        told = asdict(self) | {"ridge": None if self.ridge is None else str(self.ridge)}
        told = {name: value for name, value in told.items() if name not in BEFORE or BEFORE[name] != value}
        return told | ({"saved_layers": list(self.saved_layers)} if self.saved_layers else {})


# the settings that descriptions of before do not name, as they were then
BEFORE = {
    "saved_layers": (), "judge": "next", "prior": "", "switch": "fixed", "budget_gib": 0.0, "most_warmup_frames": 0,
}  # fmt: skip


def settings_from(description: dict[str, Any]) -> AbsorptionSettings:
    """The settings that `describe` described. ValueError or TypeError for anything else."""
    ridge = description.get("ridge")
    there = BEFORE | description
    numbers = {"ridge": None if ridge is None else float(ridge), "saved_layers": tuple(there["saved_layers"])}
    return AbsorptionSettings(**(there | numbers))


def as_in_state(settings: AbsorptionSettings, state: Any) -> AbsorptionSettings:
    """The same settings for a run that goes on from one that `state` describes: what no input says is as it was there, and so is a
    budget that is not known yet."""
    if not isinstance(state, dict):
        return settings
    there = BEFORE | state
    settings = replace(settings, judge=there["judge"]) if there["judge"] in JUDGES else settings
    budget = there["budget_gib"]
    open_budget = settings.switch == there["switch"] == "memory" and not settings.budget_gib
    return replace(settings, budget_gib=budget) if open_budget and isinstance(budget, float) else settings


def blocks_of(settings: AbsorptionSettings, heads: int) -> int:
    """Blocks of the statistics: one a head, or one for the layer."""
    return heads if settings.scope == "head" else 1
