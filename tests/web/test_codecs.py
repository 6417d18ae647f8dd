"""A video that the browser does not play: the node says so, and shows the preview's pictures instead of an empty player."""

from __future__ import annotations

import pytest

_SET_CODEC = """([codec, length]) => {
  const set = (type, name, value) =>
    (app.graph.nodes.find((node) => node.type === type).widgets.find((widget) => widget.name === name).value = value);
  set("AdaStateStreamOutput", "codec", codec);
  set("AdaStateRollout", "length", length);
}"""


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2)
def test_what_is_not_played_is_told(renderer, open_front_end, host, folders, artefacts):
    page = open_front_end(renderer)
    page.open_template("long_video")
    for codec in ("prores", "h264"):
        page.tab.evaluate(_SET_CODEC, [codec, 33])
        page.tab.evaluate("() => app.queuePrompt(0)")
        page.tab.wait_for_function(
            "(told) => { const view = document.querySelector('.adastate-live[data-outcome=done]');"
            " return view && (view.querySelector('.adastate-unplayable').textContent !== '') === told; }",
            arg=codec == "prores",
            timeout=120_000,
        )
        shown = page.tab.locator(".adastate-preview").first.get_attribute("src")
        assert shown.startswith("data:image/jpeg")
        if codec == "h264" and renderer == "classic":  # Nodes 2.0 of this front end has no player of its own
            page.tab.wait_for_selector("video", timeout=30_000, state="attached")
        elif codec == "prores":
            page.tab.wait_for_timeout(3000)
            assert page.tab.locator("video").count() == 0
            said = page.tab.locator(".adastate-unplayable").first.inner_text()
            assert "does not play prores" in said and "Open the file in a player or an editor" in said
            page.screenshot(artefacts / f"unplayable_{renderer}.png")
            told = max(host.request("/history").values(), key=lambda entry: entry["prompt"][0])["outputs"]["5"]
            assert told["images"][0]["filename"].endswith(".mov")  # the file is an output all the same
            assert (folders["output"] / "video" / told["images"][0]["filename"]).is_file()
    assert page.complaints == []
