"""What the absorption of a rollout is asked to do, and when; checked before anything runs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

PHASES = ("warming", "switched", "nothing to absorb")
SCOPES = ("head", "layer", "lowrank")
REFRESHES = ("never", "drift", "always")
SELECTIONS = ("sensitivity", "residual", "discrepancy", "explained", "saved")
# tried from right to left, so that doing nothing wins ties (measured: small ridges overfit badly)
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)
# how many of the newest chunks a new solve gets, in addition to all that were collected before
REFRESH_CHUNKS = 4


@dataclass(frozen=True)
class AbsorptionSettings:
    """ISPA (arXiv 2607.00712) as this pack reads it; latent frames throughout.

    After `warmup_frames`, floor(`ratio` * layers) layers are switched: those whose history is best absorbed. A switched layer keeps
    only the first `sink_frames` frames (less those that the anchor holds), the newest `local_window_frames`, and the chunk
    being made. `ridge`: a number, or None to choose from RIDGES on held-out rows. `absorb` off is the paper's No Absorb: the same
    as an infinite ridge.

    `monitor_layers` of the switched layers (-1: all) keep their history in host memory. Every `monitor_chunks` chunks their
    residual is measured again. They may then be solved anew: with `refresh` "always" each time, with "drift" only if the
    residual is more than `drift` times what it was at the switch. A new solve uses all that has been collected, with the newest
    REFRESH_CHUNKS chunks. The last chunk is held out. On it the new correction has to be better than the old one and better
    than none.

    `select`, one of SELECTIONS, says which layers absorb best: those without whose history the picture changes least
    ("sensitivity", sensitivity.py), those with the least error left, with the least to absorb, with most of it explained, or
    (of "saved") those that come first in `saved_layers`.
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
        }
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge is {self.ridge}; it must be a number of at least 0, or auto")
        if not self.drift >= 0:
            raise ValueError(f"drift is {self.drift}; it must be at least 0")
        choices = (("scope", SCOPES), ("select", SELECTIONS), ("refresh", REFRESHES))
        for name, value, known in ((name, getattr(self, name), known) for name, known in choices):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
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

    def pinned(self, anchor_frames: int) -> int:
        """How many sink frames a layer has to keep itself, because the anchor does not hold them."""
        return max(0, self.sink_frames - anchor_frames)

    def layers(self, count: int) -> int:
        """K, how many of `count` layers are switched."""
        return math.floor(self.ratio * count + 1e-9)

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
    def ridges(self) -> tuple[float, ...]:
        """Candidates, from the largest down."""
        if not self.absorb:
            return (math.inf,)
        return tuple(reversed(RIDGES)) if self.ridge is None else (self.ridge,)

    def describe(self) -> dict[str, Any]:
        """JSON-able; equal descriptions mean equal behaviour. Descriptions of before have no saved layers."""
        told = asdict(self) | {"ridge": None if self.ridge is None else str(self.ridge)}
        saved = told.pop("saved_layers")
        return told | ({"saved_layers": list(saved)} if saved else {})


def settings_from(description: dict[str, Any]) -> AbsorptionSettings:
    """The settings that `describe` described. ValueError or TypeError for anything else."""
    ridge = description.get("ridge")
    saved = tuple(description.get("saved_layers", ()))
    return AbsorptionSettings(
        **(description | {"ridge": None if ridge is None else float(ridge), "saved_layers": saved})
    )


def blocks_of(settings: AbsorptionSettings, heads: int) -> int:
    """Blocks of the statistics: one a head, or one for the layer."""
    return heads if settings.scope == "head" else 1
