"""What absorption does to the pictures: against the full history of the same seed, and against the world.

    python3 run.py train absorption_quality --config training/configs/absorption_quality.toml

A correction belongs to one video, so every stream is rolled out by itself. The first contender is the full history that the
others are compared with. With `change_at` every stream goes on with the next stream's words from that latent frame.
Measurements are kept in the run's folder; the table goes to `folder/quality.md`, with differences of the pairs in `compared`; plots
of the contenders that `plotted` names (all without it) beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from adastate_core.decode.wan_vae import pictures_of
from adastate_core.geometry import WAN21
from adastate_core.measure.metrics import flicker, nearness
from adastate_core.prompts.demo_words import prompt

from . import measures
from .bare_model import load_codec
from .contenders import Contender, collected
from .evaluate import LEAD, TrueSegments, evaluation_scenes, figures, interval
from .kept_streams import ENDING, read_kept, rounded, write_kept
from .run import Run, log
from .sheets import decoded, draw_sheet
from .small_pictures import write_figure
from .world import CHUNK_LATENTS, Scene

TO_FULL = ("PSNR to full, dB", "SSIM to full")
SAME = 100.0  # dB, of equal pictures
FLICKER = "flicker at the chunk's rate"
SHOWN = ("balloon off its colour, dE", "balloon found", "sky off its colours, dE", "flow error, px a frame", "seam")


def chunk_flicker(video: torch.Tensor) -> float:
    """Share of the motion's variation over time that has the chunks' period (12 pictures) and its overtones."""
    return flicker(measures.motion(video), WAN21.temporal_stride * CHUNK_LATENTS)


class Quality:
    """The scenes and segments that every contender is judged on."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.codec = load_codec(self.config["codec"])
        self.true_segment = TrueSegments(self.codec)
        self.scenes = evaluation_scenes(self.config["streams"], self.config["scenes_seed"])
        span = self.config["segment_latents"]
        self.segments = {f"{n / 4:.0f} s": range(n - span, n) for n in self.config["latents"]}
        self.reference = Contender(**self.config["contenders"][0])

    def rolled_out(self, contender: Contender, stream: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """(latents [1, 16, T, h, w], the absorber's report) of one stream; kept in the scratch folder."""
        file = Path(self.config["scratch"], f"{_file_name(contender)}_{stream}.pt")
        if file.exists():
            kept = torch.load(file, weights_only=True)
            return kept["latents"], json.loads(kept["report"])
        length, change = max(self.config["latents"]), self.config.get("change_at", 0)
        rollout = contender.rollout([self.scenes[stream]], self.config["seed"] + stream)
        parts = collected(rollout, change, [range(change)]) if change else []
        if change:
            following = self.scenes[(stream + 1) % len(self.scenes)]
            rollout.model.set_context(prompt(following.words(0)))
        latents = torch.cat([*parts, *collected(rollout, length, [range(change, length)])], 2)
        absorber = rollout.absorber
        report = {} if absorber is None else absorber.report()
        torch.save({"latents": latents, "report": json.dumps(report)}, file)
        return latents, report

    def pictures(self, contender: Contender, stream: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(segment -> pictures [t, h, w, 3], the absorber's report) of one stream."""
        latents, report = self.rolled_out(contender, stream)
        pictures = {}
        for name, frames in self.segments.items():
            lead = max(0, frames.start - LEAD)
            whole = decoded(self.codec, latents[0, :, lead : frames.stop])
            pictures[name] = whole[pictures_of(frames.start - lead) :]
        return pictures, report

    def measured(self, contender: Contender) -> dict[str, Any]:
        """{"rows": segment -> one dict a stream, "psnr": segment -> curves, "reports": one a stream}."""
        file = self.run.folder / f"{_file_name(contender)}{ENDING}"
        if file.exists():
            return read_kept(file)
        found: dict[str, Any] = {
            "rows": {s: [] for s in self.segments},
            "psnr": {s: [] for s in self.segments},
            "reports": [],
        }
        for stream, scene in enumerate(self.scenes):
            full, _ = self.pictures(self.reference, stream)
            pictures, report = self.pictures(contender, stream)
            found["reports"].append(report)
            for name, video in pictures.items():
                noise, similar = nearness(video, full[name], window=5)
                row = {
                    TO_FULL[0]: noise.mean().item(),
                    TO_FULL[1]: similar.mean().item(),
                    FLICKER: chunk_flicker(video),
                }
                if contender is not self.reference and torch.equal(video, full[name]):
                    row = self.measured(self.reference)["rows"][name][stream]
                elif not self.config.get("change_at"):
                    row |= self._figures(video, scene, self.segments[name])
                found["rows"][name].append(row)
                found["psnr"][name].append([round(v, 2) for v in noise.tolist()])
            if stream < 2:
                sheet = Path(self.config["scratch"], f"{_file_name(contender)}_{stream}.png")
                draw_sheet(list(pictures.values()), sheet)
        write_kept(file, json.dumps(rounded(found)))
        log.info("%s", contender.name)
        return rounded(found)

    def _figures(self, video: torch.Tensor, scene: Scene, frames: range) -> dict[str, float]:
        true = self.true_segment(scene, frames)
        return figures(video, scene, true, WAN21.pictures(frames.start))


def _file_name(contender: Contender) -> str:
    return contender.name.replace(" ", "_").replace(",", "")


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Means with 95 % intervals over streams, a line a contender and segment where its pictures are not the full history's."""
    reference = next(iter(results))
    first = next(iter(next(iter(results.values()))["rows"].values()))[0]
    columns = [name for name in (*TO_FULL, FLICKER, *SHOWN) if name in first]
    lines = ["| what | until | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name, found in results.items():
        for segment, rows in found["rows"].items():
            if name != reference and all(row[TO_FULL[0]] >= SAME for row in rows):
                continue
            cells = ["{:.2f} ({:.2f} to {:.2f})".format(*interval([row[column] for row in rows])) for column in columns]
            lines.append(f"| {name} | {segment} | " + " | ".join(cells) + " |")
    return lines


def differences(results: dict[str, dict[str, Any]], compared: list[list[str]]) -> list[str]:
    """For each pair in `compared` the one's nearness to the full history minus the other's, stream by stream."""
    lines = ["| what | until | " + " | ".join(TO_FULL) + " |", "| --- " * (len(TO_FULL) + 2) + "|"]
    for one, other in compared:
        for segment, rows in results[one]["rows"].items():
            pairs = list(zip(rows, results[other]["rows"][segment], strict=True))
            if all(a[TO_FULL[0]] >= SAME and b[TO_FULL[0]] >= SAME for a, b in pairs):
                continue
            cells = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*interval([a[c] - b[c] for a, b in pairs])) for c in TO_FULL]
            lines.append(f"| {one}, minus {other} | {segment} | " + " | ".join(cells) + " |")
    return lines


def watched(reports: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(latent frames, share of the missing energy that the corrections left there), a mean over streams and layers."""
    shares: dict[int, list[float]] = {}
    for entry in (e for report in reports for e in report["monitor"]):
        shares.setdefault(entry["frame"], []).append(entry["residual"] / max(entry["discrepancy"], 1e-12))
    return sorted(shares), [sum(shares[frame]) / len(shares[frame]) for frame in sorted(shares)]


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Nearness to the full history over time, and what each layer would lose before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        segment: {name: torch.tensor(found["psnr"][segment]).mean(0) for name, found in results.items()}
        for segment in next(iter(results.values()))["psnr"]
    }
    curves = {segment: each for segment, each in curves.items() if any(bool((c < SAME).any()) for c in each.values())}
    reports = {name: [r for r in found["reports"] if r.get("residuals")] for name, found in results.items()}
    monitored = {name: each for name, each in reports.items() if any(r["monitor"] for r in each)}
    count = len(curves) + 1 + bool(monitored)
    figure, panels = pyplot.subplots(1, count, figsize=(3.6 * count + 1, 4), layout="constrained", squeeze=False)
    *panels, layers, later = panels[0] if monitored else [*panels[0], None]
    colours = {name: f"C{i}" for i, name in enumerate(results)}
    for panel, (segment, each) in zip(panels, curves.items(), strict=True):
        for name, curve in each.items():
            panel.plot(curve.where(curve < SAME, torch.nan), color=colours[name], label=name, linewidth=1.2)
        _name(panel, f"5 s until {segment}: PSNR to full history, dB", "picture")
    dots = {"marker": "o", "markersize": 3, "linewidth": 1.2}
    for name, each in reports.items():
        if each:
            after = torch.tensor([[e["after"] for e in r["residuals"]] for r in each]).mean(0)
            layers.plot(after, color=colours[name], **dots)
    _name(layers, "left after absorbing, of full attention's energy", "layer")
    layers.set_yscale("log")
    for name, each in monitored.items():
        later.plot(*watched(each), color=colours[name], **dots)
        _name(later, "left later on, of what is missing", "latent frame")
        later.set_yscale("log")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    write_figure(figure, path, 100)


def _name(panel: Any, title: str, unit: str) -> None:
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel(unit, fontsize=8)


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("Compare absorbed rollouts with full history.")
    Path(run.config["scratch"]).mkdir(parents=True, exist_ok=True)
    quality = Quality(run)
    contenders = [quality.reference, *(Contender(**entry) for entry in run.config["contenders"][1:])]
    results = {contender.name: quality.measured(contender) for contender in contenders}
    lines = [f"# Absorption: {run.config['streams']} streams, against the full history of the same seed", ""]
    lines += [*table(results), "", "Segments in which every picture is the full history's are left out.", ""]
    if compared := run.config.get("compared"):
        lines += ["Differences, stream by stream:", "", *differences(results, compared), ""]
    Path(run.folder, "quality.md").write_text("\n".join(lines))
    shown = run.config.get("plotted") or [contender.name for contender in contenders[1:]]
    draw({name: results[name] for name in shown}, run.folder / "quality.png")
    log.info("%s", "\n".join(lines))


if __name__ == "__main__":
    main()
