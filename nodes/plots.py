"""Pictures of numbers, as IMAGE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from ..adastate_core.attention_share import AttentionShare

COLOURS = {"anchor": "#d1495b", "past": "#30638e", "state": "#edae49", "current": "#8d99ae"}


def _image(figure) -> torch.Tensor:
    """[1, h, w, 3] float32 in 0..1 of a drawn figure."""
    figure.canvas.draw()
    return torch.from_numpy(numpy.asarray(figure.canvas.buffer_rgba())[None, ..., :3].copy()).float() / 255


def share_plot(found: Sequence[tuple[int, AttentionShare]]) -> torch.Tensor:
    """One panel a window: the share of attention that each frame gets, over the frames in the order of time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 0.6 + 2.2 * len(found)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(found), 1, squeeze=False, sharey=True)[:, 0]
    highest = max(max(share.mean) for _, share in found)
    for panel, (window, share) in zip(panels, found, strict=True):
        kinds = [name.split()[0] for name in share.labels]
        panel.bar(range(len(kinds)), share.mean, color=[COLOURS[kind] for kind in kinds])
        panel.axhline(1 / len(kinds), color="black", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(kinds)), [_short(name) for name in share.labels], fontsize=8)
        panel.set_ylim(0, 1.2 * highest)
        panel.set_title(f"window of {window} latent frames", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    present = dict.fromkeys(name.split()[0] for _, share in found for name in share.labels)
    figure.legend(handles=[Patch(color=COLOURS[k], label=k) for k in present], loc="outside upper right", ncols=4)
    figure.supylabel("share of attention (dotted: all alike)", fontsize=9)
    return _image(figure)


def _short(name: str) -> str:
    kind, number = name.split()
    return {"anchor": f"A{number}", "past": number, "state": f"S{number}", "current": f"+{number}"}[kind]
