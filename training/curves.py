"""A run's log as curves."""

from __future__ import annotations

import json
from pathlib import Path


def draw_curves(folder: Path) -> None:
    """`folder/log.jsonl` to `folder/curves.png`: one panel a figure, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    names = [n for n in dict.fromkeys(name for line in lines for name in line) if n not in ("step", "seconds")]
    if not names:
        return
    rows = (len(names) + 2) // 3
    figure, panels = pyplot.subplots(rows, 3, figsize=(12, 2.6 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=90)
    pyplot.close(figure)
