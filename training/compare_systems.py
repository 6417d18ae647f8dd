"""The public systems on one set of weights: each rolls out by its own rules, and what becomes of the pictures is measured.

    python3 run.py train compare_systems --config training/configs/compare_systems.toml

A system is a preset (adastate_core/weights/presets.py): its steps, chunk, window, anchor and positions; latents, words and VAE are
the demo's. All see the same scenes and seeds. Streams are rolled out one by one, and every stream that is measured is kept at once
in the run's folder, in its system's file, so a run that was stopped goes on with the next one; delete a file to measure it again.
The table goes to `folder/systems.md`, latents and pictures to look at to `scratch`.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

import torch

from adastate_core.decode.wan_vae import pictures_of
from adastate_core.files.whole_file import whole_file
from adastate_core.geometry import WAN21
from adastate_core.measure.lab_colour import lab
from adastate_core.measure.metrics import displacement
from adastate_core.prompts.demo_words import prompt
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.spec import ENDINGS
from adastate_core.weights.presets import Preset, preset

from . import measures
from .bare_model import BareModel, load_codec, load_denoiser
from .contenders import collected
from .evaluate import LEAD, differences, evaluation_scenes, figures, rolled_table, true_segment
from .kept_streams import ENDING, Kept
from .run import Run, log
from .sheets import decoded, draw_sheet
from .world import CHUNK_LATENTS, DAY_FRAMES, SIZE, Scene

DRIFT, DISPLACEMENT, FINE_SEAM = "drift, dE", "displacement, px a frame", "seam, chunks of 1"
# those of the table, in its order
SHOWN = (
    DRIFT,
    "day's speed, of the true",
    DISPLACEMENT,
    "seam",
    "sharpness, of the true",
    "sky off its colours, dE",
    "balloon off its colour, dE",
    "balloon found",
)
TRUE = "true renders"
CHUNK_PICTURES = WAN21.temporal_stride * CHUNK_LATENTS
FIRST_PICTURES = WAN21.pictures(CHUNK_LATENTS)


def rollout_by(one: Preset, weights: str, scene: Scene, seed: int, length: int) -> Rollout:
    """One stream of `length` latent frames by the system's rules, in float32. ValueError where these do not go with the weights."""
    bare = BareModel(load_denoiser(weights), prompt(scene.words(0)))
    side = SIZE // WAN21.stride
    spec = RolloutSpec(
        bare.geometry, 1, side, side, one.chunk_frames, one.window_frames, one.anchor, one.positions, torch.float32,
        blocks=one.blocks, restart_frames=one.restart_frames, overlap_frames=one.overlap_frames,
        shares_window=one.shares_window, ending=ENDINGS[0] if one.shares_window else "open",
    )  # fmt: skip
    return Rollout(bare, spec, Settings(seed, one.schedule), length=length)


def mean_colour(video: torch.Tensor) -> torch.Tensor:
    """[3] mean Lab of [t, h, w, 3]."""
    return lab(video).mean((0, 1, 2))


def mean_displacement(video: torch.Tensor) -> float:
    """Pixels a frame that [t, h, w, 3] moves, a mean over its frames; NaN where no frame's movement can be told."""
    frames = (video * 255).round().byte().numpy()
    each = [displacement(now, before) for before, now in zip(frames, frames[1:], strict=False)]
    return torch.tensor(each).nanmean().item()


def measured(
    video: torch.Tensor, first: torch.Tensor, scene: Scene, true: torch.Tensor, start: int, chunk: int
) -> dict[str, float]:
    """All measures of one segment [t, h, w, 3] that begins at picture `start` of its stream.

    `first`: the stream's first pictures, from which the colour's drift is counted to the segment's last ones. `chunk`: latent
    frames a chunk, whose borders are the seams. NaN where something cannot be told.
    """
    found = figures(video, scene, true, start)
    colours = mean_colour(video[-CHUNK_PICTURES:]), mean_colour(first)
    return found | {
        DRIFT: torch.dist(*colours).item(),
        DISPLACEMENT: mean_displacement(video),
        "seam": measures.seam(video, start, WAN21.temporal_stride * chunk),
        FINE_SEAM: measures.seam(video, start, WAN21.temporal_stride),
    }


class Comparison:
    """The scenes and segments that every system is measured on, and what has been measured so far."""

    def __init__(self, run: Run) -> None:
        self.folder, self.config = run.folder, run.config
        self.scratch = Path(self.config["scratch"])
        self.codec = load_codec(self.config["codec"])
        self.scenes = evaluation_scenes(self.config["streams"], self.config["scenes_seed"])
        self.length = max(self.config["latents"])
        span = self.config["segment_latents"]
        self.segments = {seconds(n): range(max(0, n - span), n) for n in self.config["latents"]}
        self.systems = {name: group for group, names in self.config["systems"].items() for name in names}
        self.found = {name: self._kept(name) for name in (TRUE, *self.systems)}
        for name, other in self.config.get("same", {}).items():
            if self.rules(name) != self.rules(other):
                raise ValueError(f"{name} does not have the rules of {other}; list it among the systems to measure it")
        self._true: tuple[int, dict[str, torch.Tensor]] = -1, {}

    def rules(self, name: str) -> dict[str, Any]:
        """By what a system's streams are measured, JSON-able: figures that were measured otherwise are not this comparison's."""
        asked = {key: self.config[key] for key in ("seed", "scenes_seed", "segment_latents", "latents")}
        if name == TRUE:
            return asked
        one = preset(name)
        return asked | {
            "sigmas": list(one.schedule.sigmas),
            "first_sigmas": list(one.schedule.first_sigmas),
            "told": list(one.schedule.told),
            "chunk_frames": one.chunk_frames,
            "window_frames": one.window_frames,
            "positions": one.positions,
            "anchor": one.anchor.describe(),
            "blocks": one.blocks,
            "restart_frames": one.restart_frames,
            "overlap_frames": one.overlap_frames,
            "shares_window": one.shares_window,
        }

    def _kept(self, name: str) -> Kept:
        return Kept(self.folder / f"{name.replace(' ', '_')}{ENDING}", self.rules(name))

    def latents(self, name: str, stream: int) -> torch.Tensor:
        """[16, T, h, w] of one stream; from the scratch folder if they were made by the same rules."""
        path, rules = self.scratch / f"{name}_{stream}.pt", json.dumps(self.rules(name))
        if path.exists() and (kept := torch.load(path, weights_only=True))["rules"] == rules:
            return kept["latents"]
        rollout = rollout_by(
            preset(name), self.config["weights"], self.scenes[stream], self.config["seed"] + stream, self.length
        )
        latents = collected(rollout, self.length, [range(self.length)])[0][0]
        self.scratch.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            torch.save({"rules": rules, "latents": latents}, file)
        return latents

    def true(self, stream: int) -> dict[str, torch.Tensor]:
        """Segment -> the world's own pictures through the codec; those of one stream are held."""
        if self._true[0] != stream:
            scene = self.scenes[stream]
            self._true = stream, {s: true_segment(self.codec, scene, frames) for s, frames in self.segments.items()}
        return self._true[1]

    def pictures(self, name: str, stream: int) -> dict[str, torch.Tensor]:
        """Segment -> pictures [t, h, w, 3] of a system's stream; under "" its first chunk's."""
        if name == TRUE:
            return self.true(stream) | {"": true_segment(self.codec, self.scenes[stream], range(CHUNK_LATENTS))}
        latents = self.latents(name, stream)
        found = {"": decoded(self.codec, latents[:, :CHUNK_LATENTS])}
        for segment, frames in self.segments.items():
            lead = max(0, frames.start - LEAD)
            found[segment] = decoded(self.codec, latents[:, lead : frames.stop])[pictures_of(frames.start - lead) :]
        return found

    def measure(self, name: str, stream: int) -> None:
        """Measure one stream of one system, and keep it."""
        pictures, true = self.pictures(name, stream), self.true(stream)
        chunk = CHUNK_LATENTS if name == TRUE else preset(name).chunk_frames
        rows = {}
        for segment, frames in self.segments.items():
            start, scene = WAN21.pictures(frames.start), self.scenes[stream]
            rows[segment] = measured(pictures[segment], pictures[""], scene, true[segment], start, chunk)
        self.found[name].keep(stream, rows)
        log.info("%s, stream %d: %s", name, stream, {s: round(row[DRIFT], 1) for s, row in rows.items()})

    def results(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        """Title -> segment -> measures of every stream."""
        count = len(self.scenes)
        return {
            self.title(name): {segment: kept.all(count, segment) for segment in self.segments}
            for name, kept in self.found.items()
        }

    def title(self, name: str) -> str:
        """What a row is called: the system, without the weights that it is made for, and those that have the same rules."""
        if name == TRUE:
            return name
        others = [other for other, one in self.config.get("same", {}).items() if one == name]
        return "; ".join(preset(each).title.partition(", on ")[0] for each in (name, *others))

    def draw(self, stream: int) -> None:
        """One row a system, in the order of the table, for every segment; pictures that are there are not drawn again."""
        paths = {s: self.scratch / f"sheet_{s.replace(' ', '_')}_{stream}.png" for s in self.segments}
        if all(path.exists() for path in paths.values()):
            return
        every = [self.pictures(name, stream) for name in self.found]
        for segment, path in paths.items():
            draw_sheet([pictures[segment] for pictures in every], path)


def seconds(latents: int) -> str:
    return f"{WAN21.pictures(latents) / WAN21.fps:.0f} s"


def table(comparison: Comparison) -> list[str]:
    """The whole page: what is compared, the means, the differences, and each system's rules."""
    config, results = comparison.config, comparison.results()
    own = preset(config["trained_with"])
    title = comparison.title(own.name)
    return [
        f"# Systems: {config['streams']} streams of {list(comparison.segments)[-1]} on the demo's weights",
        "",
        f"These weights were trained with one of them, {title} ({own.source}): by its anchor, window, positions and steps. So",
        "the table says how the rules of the others behave on weights that never met them, and not what the systems do as their",
        "authors trained them.",
        "",
        "Means over streams with 95 % bootstrap intervals, each measured in the "
        f"{seconds(config['segment_latents'])} that end at the time given.",
        "`python3 run.py train compare_systems --config training/configs/compare_systems.toml` makes the table.",
        "",
        *rolled_table(results, [], SHOWN),
        *differences(results, title, [one for one in results if one not in (TRUE, title)], SHOWN),
        "",
        *_legend(results),
        "",
        *_rules(comparison, own),
    ]


def _legend(results: dict[str, dict[str, list[dict[str, float]]]]) -> list[str]:
    """What the columns are."""
    seams = {segment: statistics.mean(row[FINE_SEAM] for row in rows) for segment, rows in results[TRUE].items()}
    fine, day = ", ".join(f"{seam:.2f} at {segment}" for segment, seam in seams.items()), DAY_FRAMES / WAN21.fps
    text = (
        f"*drift*: Lab distance of the last {CHUNK_PICTURES} pictures' mean colour from that of the first {FIRST_PICTURES}. A day "
        f"lasts {day:.0f} s in this world, so the {TRUE} drift, too: where the *day's speed* is low, little drift is a sky that "
        "stands still, not a steady picture. The distances of *sky* and *balloon* from their own colours leave the sunset out. "
        "*displacement*: how far blocks of the picture move, by phase correlation. *seam*: motion across the system's chunk "
        "borders over motion inside. *sharpness*: pixel differences. *balloon found*: share of pictures. "
        f"The {TRUE} are the same scenes by the world's own rules, through the demo's VAE; what a system should have is theirs. "
        f"Over chunks of one latent frame, as the frame-wise system has them, their seam is {fine}."
    )
    return textwrap.wrap(text, 130)


def _rules(comparison: Comparison, own: Preset) -> list[str]:
    """Each system's rules, by group, and whether its steps are those that the weights were trained with."""
    lines = []
    for group in dict.fromkeys(comparison.systems.values()):
        lines += [f"{group[0].upper()}{group[1:]}:", ""]
        for name in (name for name, its in comparison.systems.items() if its == group):
            one = preset(name)
            steps = "the steps of training" if one.schedule == own.schedule else "other steps than in training"
            lines.append(f"- {comparison.title(name)} (preset *{name}*): {steps}; {'; '.join(_told(one))}")
        lines.append("")
    return lines[:-1]


def _told(one: Preset) -> list[str]:
    """A system's rules that these streams meet, a phrase each."""
    told = [
        "noise levels " + ", ".join(f"{sigma:.4g}" for sigma in one.schedule.sigmas),
        f"latent frames a chunk: {one.chunk_frames}, window: {one.window_frames}, anchor ({one.anchor.kind}): {one.anchor.frames}",
        f"{one.positions} positions",
    ]
    if one.schedule.told:
        told.append("the model is told the timesteps " + ", ".join(f"{timestep:.4g}" for timestep in one.schedule.told))
    if one.blocks > 1:
        shared = "; they share the window's room, which shrinks at the end" if one.shares_window else ""
        told.append(f"{one.blocks} chunks are denoised together at rising noise{shared}")
    if one.restart_frames:
        told.append(f"starts afresh every {one.restart_frames} latent frames over {one.overlap_frames} old ones")
    return told


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Compare the public systems' rules on one set of weights.")
    comparison = Comparison(run)
    for stream in range(len(comparison.scenes)):
        for name, kept in comparison.found.items():
            if str(stream) not in kept.streams:
                comparison.measure(name, stream)
    for stream in range(run.config["drawn"]):
        comparison.draw(stream)
    text = "\n".join(table(comparison)) + "\n"
    with whole_file(run.folder / "systems.md") as file:
        file.write(text.encode())
    log.info("%s", text)


if __name__ == "__main__":
    main()
