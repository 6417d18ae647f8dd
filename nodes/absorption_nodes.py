"""Absorption (ISPA): layers that forget their history and are corrected for it; saved, loaded, plotted."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ..adastate_core.absorption.saved import load_solution, save_solution, solution_from, under
from ..adastate_core.absorption.settings import SCOPES, SELECTIONS, AbsorptionSettings, settings_from
from ..adastate_core.absorption.solve import Solution
from ..adastate_core.rollout import RolloutSpec, RolloutState
from .host import api
from .host.api import io, schema, ui, widget
from .host.node import Node, shown
from .host.output_files import (
    ABSORPTION_SUFFIX,
    check_prefix,
    check_saved,
    saved_files,
    saved_fingerprint,
    saved_path,
    write_new,
)
from .plots import absorption_plot

CATEGORY = "AdaState/absorption"
SCHEDULES = {"once": "never", "when it drifts": "drift", "every few chunks": "always"}
_RIDGE = re.compile(r"(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:e[+-]?[0-9]{1,4})?|inf(?:inity)?", re.I | re.A)
# what reading and drawing raise of any JSON that is something else
_NO_REPORT = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError)
# what a solved correction has to share with the rollout that takes it
BELONGS = ("model", "geometry", "height", "width", "chunk_frames", "window_frames", "anchor", "positions")


@dataclass(frozen=True)
class AbsorptionRequest:
    """ADASTATE_ABSORPTION: settings, and a correction solved before with what it belongs to."""

    settings: AbsorptionSettings
    name: str = ""
    belongs_to: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    # the saved one whose layers are to be switched, if the settings' layers are its
    layers_of: AbsorptionRequest | None = None

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


_SOME_LAYERS = AbsorptionRequest(AbsorptionSettings(), state={"chosen": [0]})


def parse_ridge(text: str) -> float | None:
    """None for "auto", else the number; ValueError in one sentence for anything else."""
    if text.strip().lower() == "auto":
        return None
    value = float(text) if _RIDGE.fullmatch(text.strip()) else math.nan
    if math.isinf(value) and "inf" not in text.lower():
        value = math.nan  # too many digits, not a wish for no correction
    if not value >= 0:
        raise ValueError(
            f"ridge is {shown(text)}; give auto, or a number of at least 0 such as 0.3 (inf: no correction)"
        )
    return value


class AbsorptionNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAbsorption",
            display_name="ISPA Cache Absorption",
            category=CATEGORY,
            description="After a warm-up some layers forget their history for good; a correction solved in closed form stands "
            "in for it (ISPA, arXiv 2607.00712). Pays with long windows; a window of 6 has nothing to absorb.",
            search_aliases=["ISPA", "KV cache", "eviction", "AdaState"],
            inputs=[
                widget(
                    io.Float, "ratio", default=0.5, min=0.0, max=1.0, step=0.05,
                    tooltip="Share of the layers that forget, not of the cache: the plan and the report say how much of that is "
                    "freed. The paper goes to 0.5.",
                ),
                widget(
                    io.Int, "warmup_frames", default=24, min=1, max=4096,
                    tooltip="Latent frames with full attention, while statistics are collected (the paper: at least 12).",
                ),
                widget(
                    io.Int, "local_window_frames", default=6, min=0, max=4096,
                    tooltip="Newest latent frames that the chosen layers keep.",
                ),
                widget(
                    io.Int, "sink_frames", default=1, min=0, max=64,
                    tooltip="First latent frames that they keep; an anchor's frames count.",
                ),
                widget(
                    io.String, "ridge", default="auto",
                    tooltip="How carefully to fit: auto chooses on held-out rows; a number fixes it; inf corrects nothing.",
                ),
                widget(
                    io.Combo, "scope", options=list(SCOPES), default="head",
                    tooltip="A correction for each head, for the whole layer (needs far more memory), or of low rank.",
                ),
                widget(io.Int, "rank", default=64, min=1, max=4096, tooltip="Rank of a low-rank correction."),
                widget(
                    io.Combo, "select", options=list(SELECTIONS), default="sensitivity",
                    tooltip="Which layers: those without whose history the picture changes least (a pass a layer, once: of 30 layers "
                    "about six chunks' work), least error left, least to absorb, most of it explained, or a saved absorption's.",
                ),
                widget(
                    io.Boolean, "absorb", default=True,
                    tooltip="Off: the layers forget and nothing stands in (the paper's No Absorb).",
                ),
                widget(
                    io.Combo, "schedule", options=list(SCHEDULES), default="once",
                    tooltip="Whether corrections are solved again later, from history kept in the computer's memory.",
                ),
                widget(
                    io.Int, "monitor_layers", default=0, min=-1, max=256, optional=True, advanced=True,
                    tooltip="Layers that keep their history in the computer's memory to be measured by; -1 all of them.",
                ),
                widget(
                    io.Int, "monitor_chunks", default=8, min=1, max=4096, optional=True, advanced=True,
                    tooltip="Chunks from one measurement to the next.",
                ),
                widget(
                    io.Float, "drift", default=1.5, min=0.0, max=100.0, step=0.1, optional=True, advanced=True,
                    tooltip="It has drifted if the error is this many times what it was at the switch.",
                ),
                api.Absorption.Input(
                    "saved_layers", optional=True,
                    tooltip="For select saved: Load Absorption, whose layers are switched here. Their corrections are solved anew.",
                ),
            ],
            outputs=[api.Absorption.Output("absorption", display_name="ABSORPTION", tooltip="For a rollout.")],
        )  # fmt: skip

    @staticmethod
    def _settings(
        ridge: str, schedule: str, saved_layers: AbsorptionRequest | None = None, **numbers: Any
    ) -> AbsorptionSettings:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if SCHEDULES[schedule] != "never" and not numbers.get("monitor_layers"):
            numbers["monitor_layers"] = -1
        if saved_layers is not None:
            numbers["saved_layers"] = saved_layers.layers
        return AbsorptionSettings(ridge=parse_ridge(ridge), refresh=SCHEDULES[schedule], **numbers)

    @classmethod
    def check(
        cls,
        ratio: float | None = None,
        warmup_frames: int | None = None,
        local_window_frames: int | None = None,
        sink_frames: int | None = None,
        ridge: str | None = None,
        scope: str | None = None,
        rank: int | None = None,
        select: str | None = None,
        schedule: str | None = None,
    ) -> str | None:
        given = {
            "ratio": ratio, "warmup_frames": warmup_frames, "local_window_frames": local_window_frames,
            "sink_frames": sink_frames, "ridge": ridge, "scope": scope, "rank": rank, "select": select,
            "schedule": schedule,
        }  # fmt: skip
        known = {name: value for name, value in given.items() if value is not None}
        if select == "saved":
            known["saved_layers"] = _SOME_LAYERS  # what is connected is only known when it runs
        try:
            cls._settings(**({"ridge": "auto", "schedule": "once"} | known))
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        saved = inputs.get("saved_layers")
        if saved is not None and not saved.layers:
            raise ValueError("saved_layers holds no layers: connect Load Absorption to it, not ISPA Cache Absorption")
        return io.NodeOutput(AbsorptionRequest(cls._settings(**inputs), layers_of=saved))


class SaveAbsorptionNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateSaveAbsorption",
            display_name="Save Absorption",
            category=CATEGORY,
            description="Writes the correction that a rollout solved, to be used again with the same model, prompt and seed.",
            is_output_node=True,
            inputs=[
                api.State.Input("state", tooltip="STATE of a rollout with absorption, after its warm-up."),
                widget(
                    io.String, "filename_prefix", default="adastate/absorption", tooltip="Where in the output folder."
                ),
            ],
            outputs=[io.String.Output("file", display_name="FILE", tooltip="Name to give Load Absorption.")],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None) -> str | None:
        return check_prefix(filename_prefix, ABSORPTION_SUFFIX) if filename_prefix is not None else None

    @classmethod
    def execute(cls, state: RolloutState, filename_prefix: str) -> io.NodeOutput:
        described = state.spec.get("absorption")
        if described is None or state.absorption.get("phase") != "switched":
            reason = "ran without absorption" if described is None else f"stands at {state.absorption.get('phase')!r}"
            raise ValueError(
                f"there is no correction to save: the rollout {reason}; connect Absorption to it and let it run past its "
                "warm-up"
            )
        settings, geometry = settings_from(described), state.spec["geometry"]
        width = geometry["heads"] * geometry["head_dim"]
        solved = under("solution.", state.absorption)
        solution = solution_from(solved, settings, geometry["layers"], width, geometry["heads"], state.spec["batch"])
        belongs_to = {name: state.spec[name] for name in (*BELONGS, "batch")} | {
            "solved_for": state.absorption.get("solved_for", {})
        }
        name = write_new(
            filename_prefix,
            ABSORPTION_SUFFIX,
            lambda path: save_solution(solution, settings, belongs_to, path, new=True),
        )
        return io.NodeOutput(name, ui=ui.PreviewText(f"{name}\n{len(solution.chosen)} layers: {list(solution.chosen)}"))


class LoadAbsorptionNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateLoadAbsorption",
            display_name="Load Absorption",
            category=CATEGORY,
            description="Reads a saved correction, so that a rollout of the same model, prompt and seed need not solve it again.",
            inputs=[
                widget(
                    io.Combo,
                    "file",
                    options=saved_files(ABSORPTION_SUFFIX) or [""],
                    tooltip="A saved correction, newest first.",
                )
            ],
            outputs=[api.Absorption.Output("absorption", display_name="ABSORPTION", tooltip="For a rollout.")],
        )

    @classmethod
    def check(cls, file: str | None = None) -> str | None:
        return check_saved(file, "absorption file")

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str:
        return saved_fingerprint(file, "absorption file")

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = saved_path(file, "absorption file")
        settings, belongs_to, state = load_solution(path)
        return io.NodeOutput(AbsorptionRequest(settings, path.name, belongs_to, state))


class AbsorptionReportNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAbsorptionReport",
            display_name="Absorption Report",
            category=CATEGORY,
            description="Plots what a rollout's absorption did: each layer's error before and after, bytes, and how it aged.",
            inputs=[
                io.String.Input("report", force_input=True, tooltip="REPORT of a rollout with absorption."),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="The plot."),
                io.String.Output("json", display_name="JSON", tooltip="The absorption's part of the report."),
            ],
        )

    @classmethod
    def execute(cls, report: str) -> io.NodeOutput:
        try:
            absorption = json.loads(report)["absorption"]
            picture = absorption_plot(absorption)
        except _NO_REPORT as error:
            raise ValueError("report is not the REPORT of a rollout with absorption; connect that output") from error
        return io.NodeOutput(picture, json.dumps(absorption, indent=1))


NODES = [AbsorptionNode, SaveAbsorptionNode, LoadAbsorptionNode, AbsorptionReportNode]
