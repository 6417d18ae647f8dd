"""Make docs/images/icon.png and banner.png, the registry's pictures, from frames in docs/images/ten_minutes.png.

python -m tools.make_art
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
CELL = 128
ICON, BANNER = 400, (1680, 720)
NIGHT, PAPER, LANTERN = (14, 16, 34), (244, 241, 232), (112, 163, 255)
# of the sheet: row and column of frames at noon, dusk and night, the balloon's height in them, and where the slice begins
SLICES = ((1, 2, 46, 0.0), (1, 9, 51, 0.3), (2, 6, 51, 0.56))
CLOSE = 98


def frame(
    sheet: Image.Image, row: int, column: int, side: int, part: tuple[int, ...] = (0, 0, CELL, CELL)
) -> Image.Image:
    """One frame of the sheet, or a part of it, enlarged smoothly from the model's own 64 pixels."""
    cell = sheet.crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    small = cell.resize((CELL // 2, CELL // 2), Image.Resampling.BOX)
    return small.resize((side, side), Image.Resampling.LANCZOS, box=tuple(edge / 2 for edge in part))


def mask(size: tuple[int, int], radius: int) -> Image.Image:
    """A rounded rectangle, smoothed."""
    large = Image.new("L", (size[0] * 4, size[1] * 4))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, large.width - 1, large.height - 1), radius * 4, fill=255)
    return large.resize(size, Image.Resampling.LANCZOS)


def icon(sheet: Image.Image) -> Image.Image:
    """One balloon in three slices, noon to night, leaning as time does."""
    scene = Image.new("RGB", (ICON, ICON))
    lean = ICON // 4
    for number, (row, column, height, start) in enumerate(SLICES):
        close = frame(sheet, row, column, ICON, (2, height - 40, 2 + CLOSE, height - 40 + CLOSE))
        left = round(start * ICON)
        shape = Image.new("L", (ICON * 2, ICON * 2), 255 if number == 0 else 0)
        if number:
            corners = [(left + lean // 2, 0), (2 * ICON, 0), (2 * ICON, ICON), (left - lean // 2, ICON)]
            ImageDraw.Draw(shape).polygon([(2 * a, 2 * b) for a, b in corners], fill=255)
        scene.paste(close, mask=shape.resize((ICON, ICON), Image.Resampling.LANCZOS))
    out = Image.new("RGBA", (ICON, ICON))
    out.paste(scene, mask=mask((ICON, ICON), 72))
    return out


def banner(sheet: Image.Image) -> Image.Image:
    """The whole ten minutes, and out of the dark on the left the name."""
    width, height = BANNER
    side = height // 4
    out = Image.new("RGB", BANNER, NIGHT)
    columns = width // side + 1
    for row in range(4):
        for column in range(columns):
            out.paste(frame(sheet, row, column, side), (width - (columns - column) * side, row * side))
    shade = Image.new("L", (width, 1))
    shade.putdata([round(250 * (1 - min(1, max(0, (x / width - 0.44) / 0.32)) ** 1.2)) for x in range(width)])
    out.paste(NIGHT, (0, 0), shade.resize(BANNER))
    draw = ImageDraw.Draw(out)
    draw.text((92, 176), "AdaState", fill=PAPER, font=ImageFont.load_default(168), stroke_width=3)
    small = ImageFont.load_default(46)
    draw.text((100, 392), "Long causal video in ComfyUI", fill=PAPER, font=small)
    draw.text((100, 456), "at a memory that does not grow", fill=PAPER, font=small)
    draw.rounded_rectangle((100, 548, 100 + 15 * 34, 560), 6, fill=(52, 58, 92))
    for number in range(4):  # the anchor, and the window that moves on
        left = 100 + (0 if number == 0 else 8 + number) * 34
        draw.rounded_rectangle((left, 540, left + 28, 568), 6, fill=LANTERN if number else (214, 40, 57))
    return out


def main() -> None:
    """Write both."""
    with Image.open(FOLDER / "ten_minutes.png") as file:
        sheet = file.convert("RGB")
    icon(sheet).save(FOLDER / "icon.png", optimize=True)
    banner(sheet).quantize(256, dither=Image.Dither.NONE).save(FOLDER / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
