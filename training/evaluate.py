"""Stage 8: the comparison. Long rollouts of every contender, measured against the world, and what each remembers.

    python3 run.py train evaluate --config training/configs/evaluate.toml

Contenders share scenes and content noise, so differences are taken stream by stream; intervals are 95 % bootstrap
intervals over streams. Results of each contender are kept in the run's folder and not computed twice: delete a file
to measure again. The table goes to `folder/comparison.md`, pictures and clips to `scratch`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from adastate_core.decode.wan_vae import pictures_of
from adastate_core.geometry import WAN21
from adastate_core.measure.metrics import sharpness

from . import measures
from .bare_model import load_codec
from .codec import decode_clip, encode_clip
from .contenders import Contender
from .recall import ColourJudge, encoded, lantern_scenes, recall
from .run import Run, log
from .sheets import decoded, draw_sheet
from .world import CHUNK_LATENTS, LANTERN_STATES, Scene, render

# latents decoded before a segment and thrown away: the codec's memory
LEAD = 3
# measure -> what it should be (a number, or the true renders' own value)
COLUMNS = {
    "flow error, px a frame": "0",
    "balloon's travel, of the true": "1",
    "day's speed, of the true": "1",
    "motion, of the true": "1",
    "sharpness, of the true": "1",
    "sky off its colours, dE": "true",
    "balloon off its colour, dE": "true",
    "balloon found": "1",
    "terrain right": "1",
    "seam": "1",
}


def evaluation_scenes(count: int, seed: int) -> list[Scene]:
    """Held-out scenes, the lantern up in every other one throughout."""
    return [Scene.draw(torch.Generator().manual_seed(seed + i), 1, (LANTERN_STATES[i % 2],)) for i in range(count)]


def true_segment(codec, scene: Scene, segment: range, render: Callable = render) -> torch.Tensor:
    """The world's own pictures of these latents, as its `render` makes them, through the codec."""
    start = max(0, segment.start - LEAD)
    frames = torch.arange(WAN21.pictures(start), WAN21.pictures(segment.stop))
    frames = frames[len(frames) - WAN21.pictures(segment.stop - start) :] if start else frames
    clip = render(scene, frames).permute(3, 0, 1, 2)[None] * 2 - 1
    pictures = decode_clip(codec, encode_clip(codec, clip)[0])[0].permute(1, 2, 3, 0)
    return ((pictures[pictures_of(segment.start - start) :] + 1) / 2).clamp(0, 1)


class TrueSegments:
    """The world's own pictures of stretches of scenes, through the codec: made once, and held for all who are measured on them."""

    def __init__(self, codec: torch.nn.Module) -> None:
        self._codec, self._made = codec, {}

    def __call__(self, scene: Scene, segment: range) -> torch.Tensor:
        if (scene, segment) not in self._made:
            self._made[scene, segment] = true_segment(self._codec, scene, segment)
        return self._made[scene, segment]


def figures(video: torch.Tensor, scene: Scene, true: torch.Tensor, first_frame: int) -> dict[str, float]:
    """Every column of the table for one segment of one stream, from `first_frame` on; NaN where it cannot be told."""
    return dict(
        zip(
            COLUMNS,
            (
                measures.flow_error(video, scene).mean().item(),
                measures.balloon_travel(video, scene) / measures.balloon_travel(true, scene),
                measures.clock_rate(video),
                (measures.motion(video).mean() / measures.motion(true).mean()).item(),
                (sharpness(video).mean() / sharpness(true).mean()).item(),
                measures.sky_reading(video)[1].mean().item(),
                torch.nanmean(measures.balloon_colour_error(video, scene)).item(),
                measures.balloon_found(video, scene).float().mean().item(),
                measures.terrain_right(video, scene).float().mean().item(),
                measures.seam(video, first_frame),
            ),
            strict=True,
        )
    )


def interval(values: list[float], resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval of it; streams that could not be told are left out."""
    known = torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)
    if not len(known):
        return math.nan, math.nan, math.nan
    picks = torch.randint(len(known), (resamples, len(known)), generator=torch.Generator().manual_seed(0))
    low, high = known[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return known.mean().item(), low, high


class Evaluation:
    """The scenes, the codec and the segments that every contender is judged on."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.codec = load_codec(self.config["codec"])
        self.true_segment = TrueSegments(self.codec)
        self.horizon = self.config["horizon_latents"]
        self.scratch = Path(self.config["scratch"])
        self.scratch.mkdir(parents=True, exist_ok=True)

    def segments(self, lengths: list[int]) -> dict[str, range]:
        """The last horizon's worth of latents at every length, by name."""
        return {f"{n}x": range((n - 1) * self.horizon, n * self.horizon) for n in lengths}

    def results(self, contender: Contender | None, lengths: list[int], streams: int) -> dict[str, list[dict]]:
        """Segment -> figures of every stream, from the folder if they are there; None stands for true renders."""
        name = contender.name if contender else "true renders"
        file = self.run.folder / f"{name}_{max(lengths)}x_{streams}.json".replace(" ", "_")
        if file.exists():
            return json.loads(file.read_text())
        scenes = evaluation_scenes(streams, self.config["scenes_seed"])
        segments = self.segments(lengths)
        keep = [range(max(0, s.start - LEAD), s.stop) for s in segments.values()]
        latents = None
        if contender:
            latents = contender.rolled_out(scenes, self.config["seed"], max(lengths) * self.horizon, keep)
        rows: dict[str, list[dict]] = {segment: [] for segment in segments}
        for i, scene in enumerate(scenes):
            for number, (segment, frames) in enumerate(segments.items()):
                true = self.true_segment(scene, frames)
                video = true
                if latents is not None:
                    lead = pictures_of(frames.start - keep[number].start)
                    video = decoded(self.codec, latents[number][i])[lead:]
                    if i < 4:
                        draw_sheet([video], self.scratch / f"{name}_{segment}_{i}.png".replace(" ", "_"))
                rows[segment].append(figures(video, scene, true, WAN21.pictures(frames.start)))
        file.write_text(json.dumps(rows))
        log.info("%s: %d streams to %dx", name, streams, max(lengths))
        return rows

    def memory(self, contender: Contender) -> dict[str, dict[str, float]]:
        """The recall test's shares by gap."""
        file = self.run.folder / f"{contender.name}_recall.json".replace(" ", "_")
        if not file.exists():
            clips, judge = self._recall_clips()
            shares = recall(contender.student(), *clips, judge, contender.schedule, self.config["seed"])
            file.write_text(json.dumps(shares))
            log.info("%s: recall %s", contender.name, shares["own"])
        return json.loads(file.read_text())

    def _recall_clips(self) -> tuple[tuple[torch.Tensor, ...], ColourJudge]:
        file = self.scratch / "recall_clips.pt"
        if not file.exists():
            chunks, encoder = self.config["recall_gap"] + 3, partial(encode_clip, self.codec)
            count, seed = self.config["recall_streams"], self.config["scenes_seed"]
            clips = encoded(lantern_scenes(count, seed + 1_000_000, chunks), chunks, encoder)
            known = encoded(lantern_scenes(count, seed + 2_000_000, 2), 2, encoder)
            torch.save((clips, known), file)
        clips, known = torch.load(file, weights_only=True)
        return clips, ColourJudge(known[0][:, :, CHUNK_LATENTS : 2 * CHUNK_LATENTS], known[2])


def rolled_table(
    results: dict[str, dict[str, list[dict]]], compared: list[list[str]], columns: Sequence[str] = tuple(COLUMNS)
) -> list[str]:
    """Means of every contender, and the differences in `compared`: lists of one and those it is set against."""
    lines = ["| contender | horizon | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name, segments in results.items():
        for segment, rows in segments.items():
            cells = []
            for column in columns:
                mean, low, high = interval([row[column] for row in rows])
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            lines.append(f"| {name} | {segment} | " + " | ".join(cells) + " |")
    for reference, *others in compared:
        lines += differences(results, reference, others, columns)
    return lines


def differences(
    results: dict[str, dict[str, list[dict]]],
    reference: str,
    others: list[str],
    columns: Sequence[str] = tuple(COLUMNS),
) -> list[str]:
    """Paired differences with 95 % intervals, in bold where they are clear of zero."""
    lines = ["", f"Differences, {reference} minus the other, stream by stream:", ""]
    lines += ["| against | horizon | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name in others:
        for segment, rows in results[name].items():
            cells = []
            for column in columns:
                pairs = zip(results[reference][segment], rows, strict=True)
                mean, low, high = interval([a[column] - b[column] for a, b in pairs])
                clear = "**" if low > 0 or high < 0 else ""
                cells.append(f"{clear}{mean:+.2f}{clear} ({low:+.2f} to {high:+.2f})")
            lines.append(f"| {name} | {segment} | " + " | ".join(cells) + " |")
    return lines


def recall_table(memories: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Recall by gap, one row a contender and kind."""
    gaps = list(next(iter(memories.values()))["own"])
    lines = ["| contender | what is counted | " + " | ".join(gaps) + " |", "| --- " * (len(gaps) + 2) + "|"]
    for name, shares in memories.items():
        for kind, by_gap in shares.items():
            lines.append(f"| {name} | {kind} | " + " | ".join(f"{by_gap[g]:.2f}" for g in gaps) + " |")
    return lines


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Compare contenders over long rollouts and by what they remember.")
    config = run.config
    evaluation = Evaluation(run)
    contenders = [Contender(**entry) for entry in config["contenders"]]
    parts = []
    for lengths, streams in config["rollouts"]:
        results = {"true renders": evaluation.results(None, lengths, streams)}
        results |= {c.name: evaluation.results(c, lengths, streams) for c in contenders}
        parts += [f"## {streams} streams, to {max(lengths)} times the training horizon", ""]
        parts += rolled_table(results, config["compared"]) + [""]
    if config["recall_streams"]:
        memories = {c.name: evaluation.memory(c) for c in contenders}
        parts += ["## Recall of the lantern's colour, by gap in chunks", "", *recall_table(memories), ""]
        log.info("mean recall: %s", {n: statistics.mean(m["own"].values()) for n, m in memories.items()})
    told = [f"- {c.name}: {c.weights}{' + ' + c.lora if c.lora else ''}; A + W + F = {c.frames}" for c in contenders]
    Path(run.folder, "comparison.md").write_text("\n".join(parts + told) + "\n")
    log.info("%s", "\n".join(parts))


if __name__ == "__main__":
    main()
