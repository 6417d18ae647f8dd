"""The pages and the figure of what absorption_recall measured: means with 95 % bootstrap intervals over streams."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .evaluate import interval
from .layer_check_table import EXPLAINED, check_lines
from .recall_rows import Row
from .small_pictures import write_figure
from .table_cells import FEWEST, cell, mean

# "near-lossless" is said only of a row whose loss of recall lies below this, the whole interval of it
NEAR = 0.05
PICTURES = {
    "balloon": "balloon off its colour, dE",
    "sky": "sky off its colours, dE",
    "seam": "seam",
    "chunk flicker": "flicker at the chunk's rate",
    "temporal flickering": "temporal flickering",
}
PICTURED = (
    "*First* and *last* are the first third of these pictures and the last; sharpness is a share of the full history's at the same "
    "chunks, by plain weights. All rows are looked at from the same chunk on."
)


class KeptStreams(Protocol):
    """What has been measured of one row, by stream."""

    streams: dict[str, dict[str, Any]]


class Measured(Protocol):
    """What a page is made of (absorption_recall.Recall): the config, the rows, and what was measured of each by its name."""

    config: dict[str, Any]
    rows: list[Row]
    kept: Mapping[str, KeptStreams]

    def pictures_of(self, row: Row) -> dict[int, dict[str, Any]]:
        """What the pictures of a row's streams gave (recall_pictures.py)."""
        ...


def streams_of(recall: Measured, row: Row) -> dict[int, dict[str, Any]]:
    """What a row's streams gave, those of the run that were not left out."""
    kept = recall.kept[row.name].streams
    numbers = range(recall.config["streams"])
    return {n: kept[str(n)] for n in numbers if str(n) in kept and "left_out" not in kept[str(n)]}


def paired(recall: Measured, one: Row, other: Row, figure: Callable[[dict[str, Any]], float]) -> list[float]:
    """`figure` of one row less that of the other, stream by stream."""
    a, b = streams_of(recall, one), streams_of(recall, other)
    return [figure(a[n]) - figure(b[n]) for n in a if n in b]


def reference_of(recall: Measured, row: Row) -> Row:
    """The full history of the same lantern, by the same weights."""
    return next(
        r for r in recall.rows if r.absorption is None and (r.shown, r.eight_bits) == (row.shown, row.eight_bits)
    )


def recall_lines(recall: Measured) -> list[str]:
    """A line a row: its recall, less the full history's and less that of the same layers dropped, and what it costs."""
    head = ["what", "streams", "KV bytes", "layers", "recall", "at each return", "minus full history",
            "minus dropped", "latents' error at the returns"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    named = {row.name: row for row in recall.rows}
    for row in recall.rows:
        found = streams_of(recall, row)
        if not found:
            continue
        each = [cell([float(f["came"][i] == f["own"]) for f in found.values()]).partition(" ")[0]
                for i in range(len(recall.config["shown"][row.shown]["asked"]))]  # fmt: skip
        full, dropped = reference_of(recall, row), named.get(row.name.replace("absorbed", "dropped"))
        own = dropped is None or dropped is row
        cells = [
            row.name, str(len(found)), f"{max(f['kv_bytes'] for f in found.values()):,}", _layers(found.values()),
            cell([f["recall"] for f in found.values()]), " ".join(each),
            "" if full is row else cell(paired(recall, row, full, _recall), "{:+.2f}"),
            "" if own else cell(paired(recall, row, dropped, _recall), "{:+.2f}"),
            cell([_error(f, recall.config["shown"][row.shown]["asked"]) for f in found.values()], "{:.3f}"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _recall(found: dict[str, Any]) -> float:
    return found["recall"]


def _error(found: dict[str, Any], asked: list[int]) -> float:
    return sum(found["to_full"][chunk] for chunk in asked) / len(asked)


def _layers(found: Iterable[dict[str, Any]]) -> str:
    """The layers that were switched, those of most streams first."""
    counts = Counter(" ".join(map(str, f["layers"])) for f in found if "layers" in f)
    return ", ".join(f"{layers} ({n})" if len(counts) > 1 else layers for layers, n in counts.most_common(3))


def donor_lines(recall: Measured) -> list[str]:
    """Where another stream's correction was put in: whose colour came."""
    lines = ["| what | streams | the donor's colour | the stream's own colour | neither |", "| --- " * 5 + "|"]
    for row in (row for row in recall.rows if row.donor):
        found = list(streams_of(recall, row).values())
        shares = [[sum(c == f[who] for c in f["came"]) / len(f["came"]) for f in found] for who in ("donor", "own")]
        neither = [1 - donor - own for donor, own in zip(*shares, strict=True)]
        lines.append(f"| {row.name} | {len(found)} | " + " | ".join(cell(s) for s in (*shares, neither)) + " |")
    return lines


def picture_lines(recall: Measured) -> list[str]:
    """Measures of the pictures; what changes from the first chunks to the last; sharpness of both, of the full
    history's at the same chunks, whose weights are whole."""
    head = ["what", "streams", *PICTURES.values(), "balloon, last less first", "sky, last less first",
            "sharpness, first", "sharpness, last"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in recall.rows:
        found = recall.pictures_of(row)
        if not found:
            continue
        full = recall.pictures_of(next(r for r in recall.rows if r.absorption is None and r.shown == row.shown))
        cells = [cell([f[name] for f in found.values()]) for name in PICTURES]
        for name in ("balloon by chunk", "sky by chunk"):
            ends = [thirds(f[name]) for f in found.values()]
            cells.append(cell([known(last) - known(first) for first, last in ends], "{:+.2f}"))
        sharp = [
            (thirds(f["sharpness by chunk"]), thirds(full[n]["sharpness by chunk"]))
            for n, f in found.items()
            if n in full
        ]
        for end in (0, 1):
            cells.append(cell([sum(own[end]) / sum(whole[end]) for own, whole in sharp]))
        lines.append(f"| {row.name} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def thirds(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first of three parts and the last."""
    part = max(1, len(values) // 3)
    return values[:part], values[-part:]


def known(values: Sequence[float]) -> float:
    """The mean of what could be told; NaN where nothing could."""
    told = [v for v in values if not math.isnan(v)]
    return mean(told) if told else math.nan


def unseen(streams: int) -> float:
    """The share of streams that may behave in a way that none of `streams` did: the end of the exact 95 % interval, of two sides.

    A bootstrap of equal values has no width, so it cannot tell.
    """
    return 1 - 0.025 ** (1 / streams)


def verdicts(recall: Measured) -> list[str]:
    """Of which rows the loss of recall may be called near-lossless, and why not of the others."""
    lines, named = [], {row.name: row for row in recall.rows}
    for one, other in recall.config["near"]:
        losses = paired(recall, named[one], named[other], _recall)
        if not losses:
            continue
        mean, low, high = interval(losses)
        rare = unseen(len(losses))
        if high >= NEAR:
            word = f"not shown to be near-lossless (the interval is not below {NEAR})"
        elif rare >= NEAR:
            word = f"not shown to be near-lossless (so few streams cannot rule out a loss in {rare:.0%} of all)"
        else:
            word = "near-lossless"
        lines.append(f"- {one} minus {other}: {mean:+.3f} ({low:+.3f} to {high:+.3f}), {len(losses)} streams: {word}.")
    return lines


def opening(config: dict[str, Any]) -> list[str]:
    """What was done, in a paragraph, and the command."""
    base, steps, window = config["absorption"], config["sampler_steps"], config["window_frames"]
    text = (
        f"The causal teacher (version 1 of the shipped weights), {steps} steps, window {window}, no anchor. The lantern is up in "
        "every third chunk, its colour is in no condition, and the switch is after "
        f"{base['warmup_frames']} latent frames. Rows differ in what their name says from: {base['select']}, "
        f"ratio {base['ratio']}, warm-up {base['warmup_frames']}, sink {base['sink_frames']}, "
        f"local window {base['local_window_frames']}. *Recall* is the share of returns in the colour that the lantern last had "
        "before the switch; chance is about a quarter. *Dropped* layers lose their history and get no correction. Means with "
        "95 % bootstrap intervals over streams; differences are taken stream by stream, with equal noise. *KV bytes* are those "
        "after the switch. W8A8: weights and activations of all matrices of the blocks in int8, emulated exactly in float; the "
        "correction stays in float. "
        f"Rows of fewer than {FEWEST} streams are a first look, without intervals."
    )
    command = f"python3 run.py train absorption_recall --config {config['file']}"
    return [*textwrap.wrap(text, 130), "", f"`{command} --streams {config['streams']}` makes this page."]


def page(recall: Measured, checks: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The whole page."""
    lines = [f"# Absorption: does the lantern come back in its colour? {recall.config['streams']} streams", ""]
    lines += [*opening(recall.config), "", *recall_lines(recall), "", *verdicts(recall), ""]
    if any(row.donor and streams_of(recall, row) for row in recall.rows):
        lines += ["## Control: another stream's correction put in", "", *donor_lines(recall), ""]
    if any(recall.pictures_of(row) for row in recall.rows):
        first = recall.config.get("pictured_from", recall.config["absorption"]["warmup_frames"])
        lines += [
            f"## Pictures from latent frame {first} on",
            "",
            *textwrap.wrap(PICTURED, 130),
            "",
            *picture_lines(recall),
            "",
        ]
    if checks:
        lines += ["## The choice of layers, against leaving each alone without its history", ""]
        lines += [*textwrap.wrap(EXPLAINED, 130), ""]
    for name, streams in checks.items():
        lines += check_lines(name, streams)
    return lines


def draw(recall: Measured, path: Path) -> None:
    """Recall by row, with its interval where there are streams enough for one, and how far latents come from the full history's,
    chunk by chunk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in recall.rows if streams_of(recall, row)]
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 0.28 * len(rows) + 1.5), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        recalls = [f["recall"] for f in streams_of(recall, row).values()]
        mean, low, high = interval(recalls)
        reach = None if len(recalls) < FEWEST else [[mean - low], [high - mean]]
        colour = "C7" if row.absorption is None else "C0"
        panels[0].errorbar(mean, place, xerr=reach, fmt="o", color=colour, markersize=4)
    panels[0].set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=8)
    panels[0].set_title("returns in the stream's own colour", fontsize=9, loc="left")
    panels[0].axvline(0.25, color="C7", linewidth=0.6)
    shown = [
        row
        for row in rows
        if row.absorption is not None and row.shown == "returning" and not row.donor and not row.eight_bits
    ]
    for number, row in enumerate(shown):
        found = streams_of(recall, row).values()
        style = {"color": f"C{number // 2 % 10}", "linestyle": "--" if "dropped" in row.name else "-", "linewidth": 1.1}
        errors = torch.tensor([f["to_full"] for f in found]).mean(0)
        panels[1].plot(errors.where(errors > 1e-6, torch.nan), label=row.name, **style)
    panels[1].set_yscale("log")
    panels[1].set_title("latents' squared difference to full history, by chunk", fontsize=9, loc="left")
    handles, names = panels[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=7, frameon=False)
    write_figure(figure, path)
