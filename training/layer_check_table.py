"""The tables of what the choice of layers was held against (layer_check.py): layer by layer, and how orders agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .layer_check import rank_correlation, smallest
from .table_cells import cell, mean

# over which chunks behind the switch errors are taken
SPANS = {"next chunk": slice(0, 1), "3 chunks": slice(0, 3), "all chunks": slice(None)}
# (loop, way, spans): what orders are held against
ABLATIONS = [
    ("open loop", "dropped", "open dropped", ("all chunks",)),
    ("open loop", "corrected", "open corrected", ("all chunks",)),
    ("closed loop", "dropped", "dropped", tuple(SPANS)),
    ("closed loop", "corrected", "corrected", tuple(SPANS)),
]
# how layers were tried for the choice -> the entry with its figures, that with the layers
CHOICES = {"corrected": ("sensitivity", "chosen"), "uncorrected": ("uncorrected sensitivity", "uncorrected chosen")}
# what is asked of the agreement of orders
ENOUGH = 0.8
EXPLAINED = (
    "Each layer alone was left without its history in every pass of the chunks behind the switch, *dropped* or *corrected*. In the "
    "*open loop* every chunk has the full history's own past, so its error is what was lost in it. In the *closed loop* the stream "
    "goes on from what it made, so errors hold how far two videos have drifted apart as well. Layers were *tried* for the choice "
    "with their correction, as the node does, and without. Rank correlations are means over streams; *of the means*: one order, of "
    f"the figures' means over streams. What was asked: a rank correlation of at least {ENOUGH}, or the same layers."
)


def errors_of(stream: dict[str, Any], entry: str, span: str) -> list[float]:
    """By layer, the mean error over the chunks of a span."""
    return [mean(by_chunk[SPANS[span]]) for by_chunk in stream[entry]]


def over_streams(rows: Sequence[Sequence[float]]) -> list[float]:
    """By layer, the mean over streams."""
    return [mean(column) for column in zip(*rows, strict=True)]


def with_entry(streams: list[dict[str, Any]], entry: str) -> list[dict[str, Any]]:
    """The streams of which it was measured: the closed loop may be that of a few."""
    return [s for s in streams if entry in s]


def judged(closed: list[dict[str, Any]]) -> bool:
    """Whether colours were looked at."""
    return bool(closed) and closed[0]["recall"] is not None


def layer_lines(name: str, streams: list[dict[str, Any]]) -> list[str]:
    """A column a layer: by what it was chosen, what it costs alone, and how often it was switched."""
    layers, closed = range(len(streams[0]["sensitivity"])), with_entry(streams, "dropped")
    head = [f"{name}, {len(streams)} streams: layer", *map(str, layers)]
    rows = {f"sensitivity, tried {how}": [s[entry] for s in streams] for how, (entry, _) in CHOICES.items()}
    for loop, way, entry, spans in ABLATIONS:
        measured = with_entry(streams, entry)
        for span in spans if measured else ():
            rows[f"latents' error, {loop}, {way}, {span}"] = [errors_of(s, entry, span) for s in measured]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    lines += [
        f"| {title} | " + " | ".join(f"{v:.3g}" for v in over_streams(each)) + " |" for title, each in rows.items()
    ]
    for way in ("dropped", "corrected") if judged(closed) else ():
        cells = [cell([s[f"{way}, recall"][i] for s in closed]) for i in layers]
        lines.append(f"| recall, closed loop, {way} | " + " | ".join(cells) + " |")
    for how, (_, chosen) in CHOICES.items():
        share = over_streams([[float(i in s[chosen]) for i in layers] for s in streams])
        lines.append(
            f"| share of streams that switch it, tried {how} | " + " | ".join(f"{v:.2f}" for v in share) + " |"
        )
    return lines


def agreement_lines(streams: list[dict[str, Any]]) -> list[str]:
    """A line an ablation: how the orders of both choices agree with it."""
    whats = ("rank correlation", "same layers", "of the means")
    head = ["against the error", "streams", *(f"tried {how}: {what}" for how in CHOICES for what in whats)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for loop, way, entry, spans in ABLATIONS:
        measured = with_entry(streams, entry)
        for span in spans if measured else ():
            cells = [
                str(len(measured)),
                *(part for choice in CHOICES.values() for part in agreement(measured, choice, entry, span)),
            ]
            lines.append(f"| {loop}, {way}, {span} | " + " | ".join(cells) + " |")
    return lines


def agreement(streams: list[dict[str, Any]], choice: tuple[str, str], entry: str, span: str) -> list[str]:
    """Rank correlation, in how many streams the same layers would be chosen, and both of the figures' means."""
    figures, chosen = choice
    errors = [errors_of(s, entry, span) for s in streams]
    each = [rank_correlation(s[figures], e) for s, e in zip(streams, errors, strict=True)]
    same = [smallest(e, len(s[chosen])) == sorted(s[chosen]) for s, e in zip(streams, errors, strict=True)]
    whole, count = (over_streams([s[figures] for s in streams]), over_streams(errors)), len(streams[0][chosen])
    alike = "the same layers" if smallest(whole[0], count) == smallest(whole[1], count) else "other layers"
    return [cell(each), f"{sum(same)} of {len(same)}", f"{rank_correlation(*whole):.2f}, {alike}"]


def carried_lines(streams: list[dict[str, Any]]) -> list[str]:
    """Which layer carries the lantern, and whether choices keep it."""
    layers, closed = range(len(streams[0]["sensitivity"])), with_entry(streams, "dropped")
    worst = min(layers, key=lambda i: sum(s["dropped, recall"][i] for s in closed))
    full = mean([s["recall"] for s in closed])
    lost = full - mean([s["dropped, recall"][worst] for s in closed])
    if lost < 0.25:
        return [
            f"No layer alone carries the lantern: without the worst, {worst}, recall falls by {lost:.2f} from {full:.2f}."
        ]
    kept = {how: mean([float(worst not in s[chosen]) for s in streams]) for how, (_, chosen) in CHOICES.items()}
    told = ", ".join(f"{share:.0%} tried {how}" for how, share in kept.items())
    carries = f"Layer {worst} carries the lantern (recall {full:.2f}, without its history {full - lost:.2f})."
    return [f"{carries} Streams that keep it: {told}."]


def check_lines(name: str, streams: list[dict[str, Any]]) -> list[str]:
    """All of one model."""
    moved = cell([s["moved"] for s in streams])
    lines = [*layer_lines(name, streams), ""]
    lines.append(f"Without the history of all layers the next chunk moves by {moved} of its own size.")
    if judged(with_entry(streams, "dropped")):
        lines += carried_lines(streams)
    return [*lines, "", *agreement_lines(streams), ""]
