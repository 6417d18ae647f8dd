"""Pictures of the demo's voice and of what the demo's ear hears in it, for the help pages."""

from __future__ import annotations

import io

import torch
from matplotlib.figure import Figure
from PIL import Image

from adastate_core.audio.demo_ear import LEVELS, codes
from adastate_core.audio.demo_tones import RATE, tones

SECONDS, SEED = 6.0, 3
PAPER, INK, VOICE, LOUD, HIGH = "#1b1b1f", "#e6e6e6", "#7fb4ff", "#ffb86b", "#9be29b"


def _figure(rows: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(6.4, 1.5 * rows), dpi=100, facecolor=PAPER, layout="constrained")
    places = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for place in places:
        place.set_facecolor(PAPER)
        place.tick_params(colors=INK, labelsize=9)
        place.set_xlim(0, SECONDS)
        for edge in place.spines.values():
            edge.set_color(INK)
    places[-1].set_xlabel("seconds", color=INK)
    return figure, list(places)


def _drawn(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")


def _waveform(place, waveform: torch.Tensor) -> None:
    place.plot(torch.arange(waveform.numel()) / RATE, waveform, color=VOICE, linewidth=0.3)
    place.set_ylabel("sound", color=INK)


def voice() -> Image.Image:
    """The waveform, and the loudness and pitch that it was made with."""
    waveform, loudness, pitch = tones(SECONDS, SEED)
    figure, (above, below) = _figure(2)
    _waveform(above, waveform[0, 0])
    time = torch.arange(len(loudness)) / 50
    below.plot(time, loudness, color=LOUD, label="loudness")
    below.plot(time, pitch, color=HIGH, label="pitch")
    below.set_ylim(-0.05, 1.05)
    below.legend(facecolor=PAPER, labelcolor=INK, fontsize=9, loc="upper right")
    return _drawn(figure)


def ear() -> Image.Image:
    """The waveform, and the weights of the levels that are heard in it."""
    waveform = tones(SECONDS, SEED)[0]
    weights = codes(waveform, RATE)[0].T
    figure, (above, middle, below) = _figure(3)
    _waveform(above, waveform[0, 0])
    for place, what, levels in ((middle, "loudness", weights[:LEVELS]), (below, "pitch", weights[LEVELS:])):
        place.imshow(
            levels, origin="lower", aspect="auto", extent=(0, SECONDS, 0.5, LEVELS + 0.5), cmap="magma", vmin=0
        )
        place.set_ylabel(what, color=INK)
        place.set_yticks((1, LEVELS), ("low", "high"))
    return _drawn(figure)
