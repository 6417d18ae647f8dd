"""Figures and sheets of frames as small PNG files: at most 256 colours each, whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from adastate_core.files.whole_file import whole_file


def write_picture(picture: Image.Image, path: Path) -> None:
    """An RGB picture as a PNG."""
    few = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    with whole_file(path) as file:
        few.save(file, "png", optimize=True)


def write_figure(figure: Any, path: Path, dpi: int = 90) -> None:
    """A matplotlib figure as a PNG; the figure is closed."""
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    pyplot.close(figure)
    write_picture(Image.open(drawn), path)
