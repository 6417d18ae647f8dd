"""Load Sound's own button: a file from the user's disk is in the input folder and chosen."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from sounds import siren

_ADD = """() => {
  app.graph.clear();
  app.graph.add(LiteGraph.createNode("AdaStateLoadSound"));
}"""
_WIDGET = "(type) => app.graph.nodes[0].widgets.find((widget) => widget.type === type)"
_PRESS = f"() => ({_WIDGET})('button').callback()"


def written(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((siren(16_000, seconds, 1) * 32767).round().astype("<i2").tobytes())
    return path


def test_a_sound_is_uploaded_and_chosen(open_front_end, host, tmp_path):
    page = open_front_end("classic")
    page.tab.evaluate(_ADD)
    for name, seconds in (("my voice.wav", 0.5), ("another.wav", 0.25)):
        with page.tab.expect_file_chooser() as chosen:
            page.tab.evaluate(_PRESS)
        chosen.value.set_files(written(tmp_path / name, seconds))
        page.tab.wait_for_function(f"(name) => ({_WIDGET})('combo').value === name", arg=name)
        (node,) = page.prompt().values()
        assert node["inputs"] == {"file": name}, "the button is no input"
        assert (host.log.parent / "input" / name).stat().st_size > 32_000 * seconds
    assert page.complaints == []
    page.tab.route("**/upload/image", lambda route: route.fulfill(status=413, body="too large"))
    with page.tab.expect_file_chooser() as chosen:
        page.tab.evaluate(_PRESS)
    chosen.value.set_files(written(tmp_path / "third.wav", 0.25))
    page.tab.get_by_text("third.wav could not be uploaded: the server answered 413").wait_for()
    (node,) = page.prompt().values()
    assert node["inputs"] == {"file": "another.wav"}
