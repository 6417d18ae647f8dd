"""Pictures of numbers, as IMAGE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ..adastate_core.measure.attention_share import CACHED, AttentionShare

COLOURS = {"anchor": "#d1495b", "past": "#30638e", "state": "#edae49", "current": "#8d99ae"}
UNITS = {
    "drift": "colour drift, dE", "colour": "off grey", "contrast": "contrast", "sharpness": "sharpness", "motion": "motion",
    "displacement": "moved, pixels", "psnr": "PSNR, dB", "ssim": "SSIM",
    "camera_motion": "camera, pixels", "object_motion": "objects, pixels",
    "seam": "seam, x motion", "seam_colour": "seam, dE",
}  # fmt: skip


def _image(figure) -> torch.Tensor:
    """[1, h, w, 3] float32 in 0..1 of a drawn figure."""
    figure.canvas.draw()
    return torch.from_numpy(numpy.asarray(figure.canvas.buffer_rgba())[None, ..., :3].copy()).float() / 255


def share_plot(
    found: Sequence[tuple[int, AttentionShare]], curves: Sequence[Sequence[AttentionShare]] = ()
) -> torch.Tensor:
    """One panel a window: the share of attention that each frame gets, over the frames in the order of time. With `curves`, one
    list of shares by chunk for each window, a panel more each: what anchor and window get, chunk after chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(14 if curves else 9, 0.6 + 2.2 * len(found)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(found), 2 if curves else 1, squeeze=False)
    panels = grid[:, 0]
    highest = max((value for _, share in found for value in share.mean), default=1.0)
    for panel, (window, share) in zip(panels, found, strict=True):
        kinds = [name.split()[0] for name in share.labels]
        panel.bar(range(len(kinds)), share.mean, color=[COLOURS[kind] for kind in kinds])
        if kinds:
            panel.axhline(1 / len(kinds), color="black", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(kinds)), [_short(name) for name in share.labels], fontsize=8)
        panel.set_ylim(0, 1.2 * highest)
        panel.set_title(f"window of {window} latent frames", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    for panel, curve in zip(grid[:, -1], curves, strict=False):
        _draw_curve(panel, curve)
    present = dict.fromkeys(name.split()[0] for _, share in found for name in share.labels)
    figure.legend(handles=[Patch(color=COLOURS[k], label=k) for k in present], loc="outside upper right", ncols=4)
    figure.supylabel("share of attention (dotted: all alike)", fontsize=9)
    return _image(figure)


def _draw_curve(panel: Any, curve: Sequence[AttentionShare]) -> None:
    """What each kind of cached frames gets in all, over the chunks; dotted: what it would get if all frames were treated alike."""
    for kind in CACHED:
        points = []
        for chunk, share in enumerate(curve):
            of_kind = [value for name, value in zip(share.labels, share.mean, strict=True) if name.split()[0] == kind]
            if of_kind:
                points.append((chunk, sum(of_kind), len(of_kind) / len(share.labels)))
        if points:
            chunks, shares, alike = zip(*points, strict=True)
            panel.plot(chunks, shares, color=COLOURS[kind], marker=".")
            panel.plot(chunks, alike, color=COLOURS[kind], linewidth=0.8, linestyle=":")
    panel.set_ylim(0, 1.05)
    panel.set_title("in all, by chunk", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    kind, number = name.split()
    return {"anchor": f"A{number}", "past": number, "state": f"S{number}", "current": f"+{number}"}[kind]


def absorption_plot(report: dict) -> torch.Tensor:
    """Each layer's error with nothing and with its correction, the switched layers marked; bytes; how it aged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    watched = report["monitor"]
    figure = Figure(figsize=(9, 4.6 if watched else 2.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if watched else 1, 1, squeeze=False)[:, 0]
    layers = [entry["layer"] for entry in report["residuals"]]
    for shift, name, colour in ((-0.2, "before", COLOURS["current"]), (0.2, "after", COLOURS["past"])):
        heights = [entry[name] for entry in report["residuals"]]
        panels[0].bar([layer + shift for layer in layers], heights, 0.4, color=colour, label=name)
    for layer in report["layers"]:
        panels[0].axvspan(layer - 0.45, layer + 0.45, color=COLOURS["state"], alpha=0.25, zorder=0)
    panels[0].set_xlabel("layer (shaded: switched)", fontsize=8)
    panels[0].set_ylabel("error of the output", fontsize=8)
    mib = 2**20
    whole, held = report["kv_bytes_before"], report["kv_bytes_after"]
    freed = f"KV {held / mib:.1f} MiB, {whole / mib:.1f} without absorption ({1 - held / max(whole, 1):.0%} freed)"
    why = report.get("switch", {}).get("why") or ""  # reports of before do not say it
    title = f"{report['phase']}: {freed}; solved in {report['solve_seconds']:.3f} s"
    panels[0].set_title("\n".join([title, str(why)[:200]] if why else [title]), fontsize=9, loc="left")
    panels[0].legend(fontsize=8, frameon=False)
    if watched:
        for layer in dict.fromkeys(entry["layer"] for entry in watched):
            mine = [entry for entry in watched if entry["layer"] == layer]
            panels[1].plot(
                [e["frame"] for e in mine], [e["residual"] for e in mine], marker="o", label=f"layer {layer}"
            )
        for frame in dict.fromkeys(entry["frame"] for entry in watched if entry["refreshed"]):
            panels[1].axvline(frame, color="black", linewidth=0.5, linestyle=":")
        panels[1].set_xlabel("latent frame (dotted: solved anew)", fontsize=8)
        panels[1].set_ylabel("error of the output", fontsize=8)
        panels[1].legend(fontsize=7, frameon=False, ncols=4)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return _image(figure)


def metrics_plot(found: dict) -> torch.Tensor:
    """Chunk by chunk over the video, or clip by clip: colour drift; contrast and sharpness; the clips' seams; motion and
    displacement; motion of camera and objects; nearness to a reference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clips = "per_clip" in found
    rows = [("drift", "colour"), ("contrast", "sharpness")]
    rows += [("seam", "seam_colour")] if any(chunk.get("seam_colour") is not None for chunk in found["chunks"]) else []
    rows += [("motion", "displacement")]
    rows += [("camera_motion", "object_motion")] if any("flow" in chunk for chunk in found["chunks"]) else []
    rows += [("psnr", "ssim")] if found["compared"] else []
    figure = Figure(figsize=(9, 0.5 + 1.7 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    for panel, names in zip(panels, rows, strict=True):
        for axis, name, colour in zip((panel, panel.twinx()), names, (COLOURS["past"], COLOURS["anchor"]), strict=True):
            points = [
                (c["chunk"] + 1 if clips else c["first_picture"], c[name])
                for c in found["chunks"]
                if c.get(name) is not None
            ]
            dots = "." if len(points) < 60 else ""
            dashes = "--" if clips and axis is not panel else "-"  # two that climb alike lie on one another
            axis.plot([x for x, _ in points], [y for _, y in points], dashes, color=colour, linewidth=1.2, marker=dots)
            if name.startswith("seam"):
                axis.set_ylim(0, 1.15 * max((y for _, y in points), default=1.0) or 1.0)
            axis.set_ylabel(UNITS[name], color=colour, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines["top"].set_visible(False)
    shares = [f"{n} {found[n]:.2f}" for n in ("flicker", "seam") if found[n] is not None]
    if found["temporal_flickering"] is not None:
        shares.append(f"temporal flickering {found['temporal_flickering']:.4f}")
    title = _climb(found) if clips else "  ".join(["by chunk", *shares])
    panels[0].set_title(title, fontsize=9, loc="left")
    panels[-1].set_xlabel("clip" if clips else "picture", fontsize=8)
    if clips:
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return _image(figure)


def _climb(found: dict) -> str:
    """What each clip adds, in words."""
    per_clip, start = found["per_clip"], found["chunks"][0]
    said = [f"{len(found['chunks'])} clips of {found['clip_frames']} pictures"]
    if per_clip["drift"] is not None:
        said.append(f"each adds {per_clip['drift']:.2f} dE of drift")
    if per_clip["contrast"] is not None and start["contrast"]:
        said.append(f"{per_clip['contrast'] / start['contrast']:+.1%} contrast")
    if per_clip["seam"] is not None:
        said.append(f"{per_clip['seam']:+.2f} to the seam")
    return ", ".join(said)
