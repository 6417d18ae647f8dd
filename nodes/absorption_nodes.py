"""Absorption (ISPA): layers that forget their history and are corrected for it; saved, loaded, plotted."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

from ..adastate_core.absorption.prior import is_prior, load_prior
from ..adastate_core.absorption.saved import load_solution, save_solution, solution_from, under
from ..adastate_core.absorption.settings import SCOPES, SELECTIONS, AbsorptionSettings, settings_from
from ..adastate_core.rollout import RolloutState
from . import absorption_prior
from .absorption_request import BELONGS, AbsorptionRequest
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
# when the warm-up ends, as the node says it
SWITCHES = {"after the warm-up": "fixed", "when memory asks": "memory", "when it stopped learning": "learned"}
SCHEDULES = {"once": "never", "when it drifts": "drift", "every few chunks": "always"}
_RIDGE = re.compile(r"(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:e[+-]?[0-9]{1,4})?|inf(?:inity)?", re.I | re.A)
# what reading and drawing raise of any JSON that is something else
_NO_REPORT = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError)
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
                    "freed. The paper's half of the cache is read as half of the layers.",
                ),
                widget(
                    io.Int, "warmup_frames", default=24, min=1, max=4096,
                    tooltip="Latent frames with full attention, while statistics are collected. The paper's \"at least 12\" is "
                    "read as latent frames.",
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
                    tooltip="Which layers: those without whose history the picture changes least (a pass a layer, once: of 30 "
                    "layers about six chunks' work), least error left, least to absorb, most of it explained, or a saved "
                    "absorption's.",
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
                api.Absorption.Input(
                    "prior", optional=True,
                    tooltip="Load Absorption with a saved prior of this checkpoint: corrections are drawn towards it, not towards "
                    "nothing.",
                ),
                widget(
                    io.Combo, "switch", options=list(SWITCHES), default=next(iter(SWITCHES)), optional=True,
                    tooltip="When the layers forget: after warmup_frames, or later, when memory asks or it stopped learning.",
                ),
                widget(
                    io.Float, "budget_gib", default=0.0, min=0.0, max=4096.0, step=0.1, optional=True,
                    tooltip="When memory asks: GiB on the device for keys, values and statistics; 0 what is free when it begins.",
                ),
                widget(
                    io.Int, "most_warmup_frames", default=0, min=0, max=4096, optional=True,
                    tooltip="When it stopped learning: latent frames after which it switches at the latest; 0 twice warmup_frames.",
                ),
            ],
            outputs=[api.Absorption.Output("absorption", display_name="ABSORPTION", tooltip="For a rollout.")],
        )  # fmt: skip

    @staticmethod
    def _settings(
        ridge: str,
        schedule: str,
        saved_layers: AbsorptionRequest | None = None,
        prior: AbsorptionRequest | None = None,
        switch: str = "after the warm-up",
        **numbers: Any,
    ) -> AbsorptionSettings:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
        if switch not in SWITCHES:
            raise ValueError(f"switch is {switch!r}; it must be one of {', '.join(SWITCHES)}")
        if SCHEDULES[schedule] != "never" and not numbers.get("monitor_layers"):
            numbers["monitor_layers"] = -1
        if saved_layers is not None:
            numbers["saved_layers"] = saved_layers.layers
        if prior is not None:
            numbers["prior"] = absorption_prior.linked(prior).fingerprint
        numbers |= {"refresh": SCHEDULES[schedule], "switch": SWITCHES[switch]}
        return AbsorptionSettings(ridge=parse_ridge(ridge), **numbers)

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
        absorb: bool | None = None,
        switch: str | None = None,
        budget_gib: float | None = None,
        most_warmup_frames: int | None = None,
    ) -> str | None:
        given = {
            "ratio": ratio, "warmup_frames": warmup_frames, "local_window_frames": local_window_frames,
            "sink_frames": sink_frames, "ridge": ridge, "scope": scope, "rank": rank, "select": select,
            "schedule": schedule, "absorb": absorb, "switch": switch, "budget_gib": budget_gib,
            "most_warmup_frames": most_warmup_frames,
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
    def execute(
        cls,
        ratio: float,
        warmup_frames: int,
        local_window_frames: int,
        sink_frames: int,
        ridge: str,
        scope: str,
        rank: int,
        select: str,
        absorb: bool,
        schedule: str,
        monitor_layers: int = 0,
        monitor_chunks: int = 8,
        drift: float = 1.5,
        saved_layers: AbsorptionRequest | None = None,
        prior: AbsorptionRequest | None = None,
        switch: str = next(iter(SWITCHES)),
        budget_gib: float = 0.0,
        most_warmup_frames: int = 0,
    ) -> io.NodeOutput:
        if saved_layers is not None and not saved_layers.layers:
            raise ValueError("saved_layers holds no layers: connect Load Absorption to it, not ISPA Cache Absorption")
        settings = cls._settings(
            ratio=ratio, warmup_frames=warmup_frames, local_window_frames=local_window_frames, sink_frames=sink_frames,
            ridge=ridge, scope=scope, rank=rank, select=select, absorb=absorb, schedule=schedule,
            monitor_layers=monitor_layers, monitor_chunks=monitor_chunks, drift=drift, saved_layers=saved_layers, prior=prior,
            switch=switch, budget_gib=budget_gib, most_warmup_frames=most_warmup_frames,
        )  # fmt: skip
        return io.NodeOutput(AbsorptionRequest(settings, layers_of=saved_layers, prior=absorption_prior.linked(prior)))


class SaveAbsorptionNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateSaveAbsorption",
            display_name="Save Absorption",
            category=CATEGORY,
            description="Writes the correction that a rollout solved, to be used again with the same model, prompt and seed; or, "
            "of a rollout that has not switched, a prior for other videos of the model.",
            is_output_node=True,
            inputs=[
                api.State.Input(
                    "state",
                    tooltip="STATE of a rollout with absorption: for a correction after its warm-up, for a prior before it ends.",
                ),
                widget(
                    io.String, "filename_prefix", default="adastate/absorption", tooltip="Where in the output folder."
                ),
                widget(
                    io.Combo,
                    "save_as",
                    options=[absorption_prior.CORRECTION, absorption_prior.PRIOR],
                    default=absorption_prior.CORRECTION,
                    optional=True,
                    tooltip="The correction of this video, or a prior for others: of a rollout whose warm-up outlasts its video.",
                ),
                api.Absorption.Input(
                    "prior", optional=True, tooltip="As prior: Load Absorption with the prior that this video joins."
                ),
            ],
            outputs=[io.String.Output("file", display_name="FILE", tooltip="Name to give Load Absorption.")],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None) -> str | None:
        return check_prefix(filename_prefix, ABSORPTION_SUFFIX) if filename_prefix is not None else None

    @classmethod
    def execute(
        cls,
        state: RolloutState,
        filename_prefix: str,
        save_as: str = absorption_prior.CORRECTION,
        prior: AbsorptionRequest | None = None,
    ) -> io.NodeOutput:
        if save_as == absorption_prior.PRIOR:
            made = absorption_prior.made_of(state, absorption_prior.linked(prior))
            name = write_new(filename_prefix, ABSORPTION_SUFFIX, lambda path: made.save(path, new=True))
            videos = "1 video" if len(made.runs) == 1 else f"{len(made.runs)} videos"
            return io.NodeOutput(name, ui=ui.PreviewText(f"{name}\na prior of {videos}"))
        if prior is not None:
            raise ValueError("a prior is connected and save_as is correction: choose prior, or leave it out")
        described = state.spec.get("absorption")
        if described is None or state.absorption.get("phase") != "switched":
            reason = "ran without absorption" if described is None else f"stands at {state.absorption.get('phase')!r}"
            raise ValueError(
                f"there is no correction to save: the rollout {reason}; connect Absorption to it and let it run past its "
                "warm-up"
            )
        settings, geometry = settings_from(described), state.spec["geometry"]
        if settings.switch != "fixed":  # what the saved correction is used by switches where this rollout did
            at = state.absorption.get("switched_at", settings.warmup_frames)
            settings = replace(settings, switch="fixed", warmup_frames=at, budget_gib=0.0, most_warmup_frames=0)
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
        if is_prior(path):
            return io.NodeOutput(AbsorptionRequest(AbsorptionSettings(), path.name, prior=load_prior(path)))
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
