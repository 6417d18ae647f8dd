"""The figure of quality over time: what the pictures look like chunk by chunk, of rows side by side."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy

from .recall_pictures import OVER_TIME
from .recall_rows import Row
from .recall_table import Measured
from .small_pictures import write_figure
from .world import CHUNK_LATENTS, FPS

# chunks that a point of a curve is the mean of, and seconds a chunk
SMOOTH, SECONDS = 5, 4 * CHUNK_LATENTS / FPS


def curve(recall: Measured, row: Row, what: str) -> tuple[list[float], list[float]]:
    """(seconds, values): the mean over streams, and over SMOOTH chunks each; nothing where no pictures were measured."""
    streams = [found[what] for found in recall.pictures_of(row).values()]
    if not streams:
        return [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a chunk whose balloon no stream shows
        by_chunk = numpy.nanmean(numpy.array(streams, dtype=float), 0)
        spans = [by_chunk[max(0, i - SMOOTH // 2) : i + SMOOTH // 2 + 1] for i in range(len(by_chunk))]
        values = [float(numpy.nanmean(span)) for span in spans]
    first = recall.config["chunks"] - len(values)
    return [(first + i) * SECONDS for i in range(len(values))], values


def draw_over_time(recall: Measured, path: Path) -> None:
    """A row of panels a measure, a column a group of rows of the config's `plots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots, named = recall.config["plots"], {row.name: row for row in recall.rows}
    size = 4.2 * len(plots), 2.6 * len(OVER_TIME) + 1.2
    figure, panels = pyplot.subplots(
        len(OVER_TIME), len(plots), figsize=size, layout="constrained", sharex=True, sharey="row", squeeze=False
    )
    for column, (group, names) in enumerate(plots.items()):
        for panel, (what, title) in zip(panels[:, column], OVER_TIME.items(), strict=True):
            for number, name in enumerate(names):
                style = {"color": "black"} if number == 0 else {"color": f"C{number - 1}"}
                seconds, values = curve(recall, named[name], what)
                if values:
                    panel.plot(seconds, values, label=name, linewidth=1.2, **style)
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(title, fontsize=8)
        panels[0, column].set_title(group, fontsize=9, loc="left")
        panels[-1, column].set_xlabel("seconds of video", fontsize=8)
        panels[0, column].legend(fontsize=6, frameon=False)
    write_figure(figure, path)
