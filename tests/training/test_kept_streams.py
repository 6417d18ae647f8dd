"""What trainers keep: figures by stream, and small pictures."""

from __future__ import annotations

import gzip
import json
import math

import numpy
import pytest
from PIL import Image

from training.kept_streams import ENDING, Kept, read_kept
from training.small_pictures import write_figure, write_picture

RULES = {"seed": 1, "lengths": [1, 6], "anchor": {"kind": "none"}}


def test_what_was_kept_is_found_again_to_five_digits(tmp_path):
    file = tmp_path / f"row{ENDING}"
    kept = Kept(file, RULES, "abc")
    kept.keep(0, {"error": 1 / 3, "series": [2 / 3, math.nan, 12345678.9], "count": 7})
    kept.keep(1, {"error": 0.0})
    kept.keep(0, {"shares": [{"anchor": 1e-13 / 3}]})
    again = Kept(file, RULES, "abc")
    assert again.streams.keys() == {"0", "1"} and again.all(2, "error") == [0.33333, 0.0]
    first = again.streams["0"]
    assert first["count"] == 7 and first["shares"] == [{"anchor": 3.3333e-14}]
    assert first["series"][0] == 0.66667 and math.isnan(first["series"][1]) and first["series"][2] == 12346000
    text = gzip.decompress(file.read_bytes()).decode()
    assert len(text.splitlines()) == 3, "the rules, and a line a stream"


def test_the_same_figures_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        Kept(tmp_path / name, RULES).keep(3, {"error": 0.25})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_figures_of_others_are_refused_and_gone_weights_are_those_of_the_file(tmp_path):
    file = tmp_path / f"row{ENDING}"
    Kept(file, RULES, "abc").keep(0, {"error": 1.0})
    for rules, weights in ((RULES | {"seed": 2}, "abc"), (RULES, "abd"), (RULES, "")):
        with pytest.raises(ValueError, match=r"row\.json\.gz was measured by other rules or weights .* delete it"):
            Kept(file, rules, weights)
    kept = Kept(file, RULES, None)
    kept.keep(1, {"error": 2.0})
    found = read_kept(file)
    assert found["weights"] == "abc" and json.dumps(found["rules"]) == json.dumps(RULES)
    assert found["streams"] == {"0": {"error": 1.0}, "1": {"error": 2.0}}


def test_pictures_have_few_colours_and_look_the_same(tmp_path):
    steps = numpy.linspace(0, 255, 96).astype(numpy.uint8)
    sky = numpy.stack(numpy.broadcast_arrays(steps[:, None], steps[None, :], numpy.uint8(90)), -1)
    write_picture(Image.fromarray(sky), tmp_path / "sky.png")
    shown = Image.open(tmp_path / "sky.png")
    assert len(shown.convert("RGB").getcolors()) <= 256
    off = numpy.abs(numpy.asarray(shown.convert("RGB")).astype(int) - sky)
    assert off.mean() < 6 and off.max() < 48


def test_a_figure_is_closed_and_written_whole(tmp_path):
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(4, 2))
    panel.plot([0, 1], [1, 0])
    write_figure(figure, tmp_path / "curve.png", 50)
    assert Image.open(tmp_path / "curve.png").size == (200, 100)
    assert not pyplot.fignum_exists(figure.number) and [file.name for file in tmp_path.iterdir()] == ["curve.png"]
