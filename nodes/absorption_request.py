"""What goes over an ABSORPTION wire, and whether a rollout can take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..adastate_core.absorption.prior import Prior
from ..adastate_core.absorption.saved import solution_from
from ..adastate_core.absorption.settings import AbsorptionSettings
from ..adastate_core.absorption.solve import Solution
from ..adastate_core.rollout import RolloutSpec

# what a solved correction has to share with the rollout that takes it
BELONGS = ("model", "geometry", "height", "width", "chunk_frames", "window_frames", "anchor", "positions")


@dataclass(frozen=True)
class AbsorptionRequest:
    """ADASTATE_ABSORPTION: settings, with a correction that was solved before and what it belongs to, or with the prior that they
    name; or a loaded prior alone, which no rollout takes."""

    settings: AbsorptionSettings
    name: str = ""
    belongs_to: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    # the saved one whose layers are to be switched, if the settings' layers are its
    layers_of: AbsorptionRequest | None = None
    prior: Prior | None = None

    @property
    def is_prior(self) -> bool:
        """Whether it is a loaded prior and nothing else."""
        return self.prior is not None and not self.settings.prior

    @property
    def asked(self) -> AbsorptionSettings:
        """What a rollout is to do. ValueError for a prior, which says nothing of that."""
        self.drawn_towards(None)
        return self.settings

    def drawn_towards(self, spec: RolloutSpec | None) -> Prior | None:
        """The prior for a rollout of `spec` (None: not known yet). ValueError where it is another's, or there is only a prior."""
        if self.is_prior:
            raise ValueError(f"{self.name} is a prior and no absorption: connect it to prior of ISPA Cache Absorption")
        if self.prior is not None and spec is not None:
            self.prior.check(spec.describe(), self.settings)
        return self.prior

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of a saved correction, those that the picture needs least first where that was measured. Empty without one."""
        if self.state is None:
            return ()
        changes = dict(self.state.get("changes", ()))
        return tuple(sorted(changes, key=lambda i: (changes[i], i))) if changes else tuple(self.state["chosen"])

    def solution(self, spec: RolloutSpec) -> Solution | None:
        """The saved correction for a rollout of `spec`; ValueError with every reason why it is another's."""
        mine = spec.describe()
        if self.layers_of is not None and (self.layers_of.belongs_to or {}).get("model") != mine["model"]:
            raise ValueError(
                f"the layers of the absorption {self.layers_of.name} are another checkpoint's: choose another select, or load one "
                "that was saved with this checkpoint"
            )
        if self.belongs_to is None or self.state is None:
            return None
        if self.state.get("items") and self.belongs_to.get("batch") != spec.batch:
            raise ValueError(
                f"the absorption {self.name} has a correction for each of {self.belongs_to.get('batch')} videos, and batch_size is "
                f"{spec.batch}: give {self.belongs_to.get('batch')}, or load one that was saved with batch_size 1, which is for all"
            )
        wrong = [
            "model is another checkpoint"
            if name == "model"
            else f"{name} was {self.belongs_to.get(name)} and is {mine[name]}"
            for name in BELONGS
            if self.belongs_to.get(name) != mine[name]
        ]
        if wrong:
            raise ValueError(f"the absorption {self.name} belongs to another rollout: {'; '.join(wrong)}")
        geometry = spec.geometry
        width = geometry.heads * geometry.head_dim
        try:
            return solution_from(self.state, self.settings, geometry.layers, width, geometry.heads, spec.batch)
        except ValueError as error:
            raise ValueError(f"the absorption {self.name} cannot be used: {error}") from error

    @property
    def solved_for(self) -> dict[str, Any] | None:
        """Prompt and seed of a saved correction."""
        return None if self.belongs_to is None else self.belongs_to.get("solved_for", {})

    def differences(self, origin: dict[str, Any]) -> list[str]:
        """What does not rule a saved correction out, but makes it a guess: another prompt or seed."""
        solved_for = self.solved_for
        return [] if solved_for is None else [name for name in origin if solved_for.get(name) != origin[name]]
