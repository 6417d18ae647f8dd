"""Does absorbed history keep who is in the picture? A lantern returns, and its colour is in no condition.

    python3 run.py train absorption_recall --config training/configs/absorption_recall.toml [--weights FILE] [--streams N]

Each stream is rolled out by itself, by the product's own code, on the causal teacher; the teacher comes out of the git history if
`weights` is not there. What was measured is kept in the run's folder after every stream, so that a run that was cut goes on, and
one with more streams adds to it. The tables go to `folder/recall.md`, a figure beside it, latents to `scratch`.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adastate_core.absorption.saved import solution_from, solution_state
from adastate_core.absorption.settings import RIDGES, AbsorptionSettings
from adastate_core.absorption.solve import Solution
from adastate_core.files.whole_file import whole_file
from adastate_core.prompts.demo_words import prompt
from adastate_core.rollout import Rollout

from .bare_model import BareModel, load_codec, load_denoiser
from .checked_models import CheckedModel, check
from .eight_bits import in_eight_bits
from .kept_streams import ENDING, Kept
from .recall import ColourJudge
from .recall_over_time import draw_over_time
from .recall_pictures import picture_figures, videos_of
from .recall_rows import Roller, Row, Warm
from .recall_table import draw, page
from .returning_lantern import colours_of, judge_of, returning_scenes, teacher_file
from .run import Run, log
from .world import CHUNK_LATENTS

# of these entries of the config a measurement is a function, together with its row
RULES = ("seed", "scenes_seed", "together", "sampler_steps", "shift", "window_frames", "chunks", "judge_streams")
# so many videos are decoded side by side
AT_ONCE = 12


class Recall:
    """The streams, the rows, and what has been measured of them so far."""

    def __init__(self, run: Run) -> None:
        self.config, self.folder, self.scratch = run.config, run.folder, Path(run.config["scratch"])
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.rows = [Row(**entry) for entry in self.config["rows"]]
        self.weights = teacher_file(Path(self.config["weights"]))
        self.digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        config, seed = self.config, self.config["scenes_seed"]
        shown = config["shown"]
        self.scenes = {
            name: returning_scenes(config["streams"], seed, config["chunks"], [*each["before"], *each["asked"]])
            for name, each in shown.items()
        }
        self.kept = {row.name: Kept(self.folder / f"{file_name(row)}{ENDING}", self.rules(row)) for row in self.rows}
        self.pictures = {
            row.name: Kept(self.folder / f"pictures_{file_name(row)}{ENDING}", self.rules(row)) for row in self.rows
        }
        self._rollers: dict[bool, Roller] = {}
        self._warm: tuple[int, dict[str, Warm]] = -1, {}

    @cached_property
    def codec(self) -> nn.Module:
        return load_codec(self.config["codec"])

    @cached_property
    def judge(self) -> ColourJudge:
        return judge_of(self.codec, self.config["judge_streams"], self.config["scenes_seed"] + 1_000_000)

    def rules(self, row: Row) -> dict[str, Any]:
        """By what a row is measured, JSON-able: what the config does not say is of the core's settings, and belongs to it."""
        settings, donor = row.settings(self.config), next((one for one in self.rows if one.name == row.donor), None)
        return {name: self.config[name] for name in RULES} | {
            "teacher": self.digest,
            "shown": self.config["shown"][row.shown],
            "anchor": row.anchor,
            "window": row.window_frames,
            "eight_bits": row.eight_bits,
            "absorption": None if settings is None else settings.describe() | {"ridges": list(map(str, RIDGES))},
            "donor": None if donor is None else self.rules(donor),
        }

    def roller(self, row: Row) -> Roller:
        if row.eight_bits not in self._rollers:
            model = load_denoiser(str(self.weights))
            if row.eight_bits:
                in_eight_bits(model)
            bare = BareModel(model, prompt(self.scenes[row.shown][0].words(0)))
            self._rollers[row.eight_bits] = Roller(bare, self.config, self.config["seed"], self.config["chunks"])
        return self._rollers[row.eight_bits]

    def warm(self, row: Row, stream: int) -> Warm | None:
        """The warm-up that a row shares with others; None for a row that differs from its first frame on."""
        if row.window_frames or row.anchor != Row("").anchor:
            return None
        asked = self.config["absorption"] | (row.absorption or {})
        # what decides after the warm-up is left out, so that rows which differ in it share one
        given = {k: v for k, v in asked.items() if k not in ("ratio", "select", "saved_layers")}
        settings = AbsorptionSettings(**given, ratio=1.0, select="residual")
        key = json.dumps([row.shown, row.eight_bits, settings.describe()])
        if self._warm[0] != stream:
            self._warm = stream, {}
        if key not in self._warm[1]:
            self._warm[1][key] = self.roller(row).warmed(row, self.scenes[row.shown][stream], stream, settings)
        return self._warm[1][key]

    def measure(self, row: Row, stream: int) -> None:
        """Roll a row's stream out, and keep what colours came and how far its latents are from the full history's."""
        donor = self.donor(row, stream) if row.donor else None
        if row.donor and donor is None:
            self.kept[row.name].keep(stream, {"left_out": "no stream beside it has another colour"})
            return
        rollout = self.roll(row, stream)
        found = self.found(row, self.tensors(row, stream, "latents")["latents"], stream)
        if rollout.absorber is not None:
            report = rollout.absorber.report()
            found |= {"layers": report["layers"], "fits": report["residuals"]}
        if donor is not None:
            found["donor"] = self.kept[row.donor].streams[str(donor)]["own"]
        found["kv_bytes"] = rollout.cache.nbytes
        self.kept[row.name].keep(stream, found)

    def roll(self, row: Row, stream: int) -> Rollout:
        """Roll a row's stream out, and keep its latents and what it solved; the rollout at its end."""
        settings, scene = row.settings(self.config), self.scenes[row.shown][stream]
        solution = self.solution(row, self.donor(row, stream)) if row.donor else None
        warm = self.warm(row, stream)
        latents, rollout = self.roller(row).gone_on(row, scene, stream, settings, warm, solution)
        if rollout.absorber is not None and rollout.absorber.solution is not None:
            self.keep_tensors(row, stream, "solution", solution_state(rollout.absorber.solution))
        self.keep_tensors(row, stream, "latents", {"latents": latents})
        return rollout

    def found(self, row: Row, latents: torch.Tensor, stream: int) -> dict[str, Any]:
        """The colours, and the mean squared difference to the full history by chunk, of [16, T, h, w]."""
        config = self.config
        shown = config["shown"][row.shown]
        warm = [c for c in shown["before"] if (c + 1) * CHUNK_LATENTS <= row.warmup(config)]
        before, came = (colours_of(self.judge, latents, chunks) for chunks in (warm, shown["asked"]))
        own = before[-1]
        full = latents
        reference = next(one for one in self.rows if one.shown == row.shown)
        if row is not reference:
            full = self.tensors(reference, stream, "latents")["latents"]
        error = (latents - full).square().unflatten(1, (-1, CHUNK_LATENTS)).mean((0, 2, 3, 4)).tolist()
        recall = sum(colour == own for colour in came) / len(came)
        return {"own": own, "before": before, "came": came, "recall": recall, "to_full": error}

    def donor(self, row: Row, stream: int) -> int | None:
        """The next stream of those that are measured together whose lantern has another colour."""
        size, kept = self.config["together"], self.kept[row.donor].streams
        first = stream - stream % size
        last = min(first + size, self.config["streams"])
        others = [*range(stream + 1, last), *range(first, stream)]
        return next((one for one in others if kept[str(one)]["own"] != kept[str(stream)]["own"]), None)

    def solution(self, row: Row, stream: int) -> Solution:
        geometry = self.roller(row).model.geometry
        donor, width = next(one for one in self.rows if one.name == row.donor), geometry.heads * geometry.head_dim
        state = self.tensors(donor, stream, "solution")
        return solution_from(state, row.settings(self.config), geometry.layers, width, geometry.heads)

    def _file(self, row: Row, stream: int, what: str) -> Path:
        return self.scratch / f"{file_name(row)}_{stream}_{what}.pt"

    def keep_tensors(self, row: Row, stream: int, what: str, values: dict[str, Any]) -> None:
        with whole_file(self._file(row, stream, what)) as file:
            torch.save({"rules": json.dumps(self.rules(row)), "values": values}, file)

    def tensors(self, row: Row, stream: int, what: str) -> dict[str, Any]:
        """What was kept of a stream; it is made again where it is not there, or is of other rules."""
        file = self._file(row, stream, what)
        if not file.exists() or torch.load(file, weights_only=True)["rules"] != json.dumps(self.rules(row)):
            self.roll(row, stream)
        return torch.load(file, weights_only=True)["values"]

    def wants(self, row: Row, stream: int) -> bool:
        """Whether a row has the stream, and it is not measured yet."""
        return (not row.streams or stream < row.streams) and str(stream) not in self.kept[row.name].streams

    def look(self, rows: list[Row], stream: int) -> None:
        """Measure the pictures of a stream of these rows, of all from the same chunk on, and keep that."""
        config = self.config
        first = config.get("pictured_from", config["absorption"]["warmup_frames"])
        latents = [self.tensors(row, stream, "latents")["latents"] for row in rows]
        for row, video in zip(rows, videos_of(self.codec, latents, first), strict=True):
            found = picture_figures(video, first, self.scenes[row.shown][stream])
            self.pictures[row.name].keep(stream, found)

    def pictures_of(self, row: Row) -> dict[int, dict[str, Any]]:
        """What the pictures of a row's streams gave, those of the run."""
        kept = self.pictures[row.name].streams
        return {n: kept[str(n)] for n in range(self.config["streams"]) if str(n) in kept}

    def run(self) -> None:
        """Measure what is still to be measured: streams in groups, within which corrections are exchanged. Rows of few streams come
        last."""
        size, count = self.config["together"], self.config["streams"]
        for first in range(0, count, size):
            group = range(first, min(first + size, count))
            for few, exchanged in ((False, False), (False, True), (True, False), (True, True)):
                rows = [row for row in self.rows if (bool(row.streams), bool(row.donor)) == (few, exchanged)]
                for stream in group:
                    for row in (row for row in rows if self.wants(row, stream)):
                        self.measure(row, stream)
                        log.info("stream %d, %s", stream, row.name)
        for stream in range(min(count, self.config["pictured"])):
            rows = [row for row in self.rows if not row.donor and (not row.streams or stream < row.streams)]
            rows = [row for row in rows if str(stream) not in self.pictures[row.name].streams]
            for some in range(0, len(rows), AT_ONCE):
                self.look(rows[some : some + AT_ONCE], stream)
                log.info("pictures of stream %d, %d of %d rows", stream, some + AT_ONCE, len(rows))


def file_name(row: Row) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in row.name).replace("__", "_").strip("_")


def checked(recall: Recall) -> dict[str, list[dict[str, Any]]]:
    """By model, what the choice of layers was held against; measured where it is not there."""
    found, config = {}, recall.config
    for one in (CheckedModel(**entry) for entry in config["check"]["models"]):
        if one.streams:
            found[one.name] = check(one, config, recall.weights, recall.digest, lambda: recall.judge, recall.folder)
    return found


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Ask for a lantern that was absorbed.", {"weights": str, "streams": int})
    recall = Recall(run)
    recall.run()
    checks = checked(recall)
    text = "\n".join(page(recall, checks))
    with whole_file(run.folder / "recall.md") as file:
        file.write(text.encode())
    draw(recall, run.folder / "recall.png")
    if "plots" in run.config:
        draw_over_time(recall, run.folder / "over_time.png")
    log.info("%s", text)


if __name__ == "__main__":
    main()
