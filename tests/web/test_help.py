"""Every node's help page: there, about that node, and naming all that the node has."""

from __future__ import annotations

import re
import urllib.request

import pytest
from conftest import ROOT

PAGES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def nodes(host) -> dict[str, dict]:
    """The pack's nodes as the host describes them."""
    info = host.request("/object_info")
    return {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.ComfyUI-AdaState"}


def test_each_node_has_a_page_and_no_page_is_left_over(nodes):
    assert sorted(nodes) == PAGES


def test_pages_are_served_and_name_every_input_and_output(nodes, host):
    for name, node in nodes.items():
        url = f"http://127.0.0.1:{host.port}/extensions/ComfyUI-AdaState/docs/{name}.md"
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
        assert text.startswith(f"# {node['display_name']}\n")
        inputs = [slot for kind in ("required", "optional") for slot in node["input_order"].get(kind, [])]
        outputs = [slot.removeprefix("ADASTATE_") for slot in node["output_name"]]
        missing = [slot for slot in (*inputs, *outputs) if f"**{slot}**" not in text]
        assert not missing, f"{name}.md does not explain {missing}"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_a_picture(name, host):
    text = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    opening = text.partition("\n## ")[0]
    ((described, file),) = re.findall(r"!\[([^]]*)\]\((images/[^)]+)\)", opening)
    assert len(described) > 20, "an alt text says what is seen"
    with urllib.request.urlopen(f"http://127.0.0.1:{host.port}/extensions/ComfyUI-AdaState/docs/{file}") as answer:
        assert answer.headers["Content-Type"].startswith("image/") and answer.read(2) in (b"\xff\xd8", b"\x89P")


def test_the_front_end_shows_a_page(open_front_end, artefacts):
    page = open_front_end("classic")
    page.open_template("long_video")
    page.tab.evaluate("() => app.canvas.selectItems(app.graph.nodes.filter((n) => n.type === 'AdaStateStreamOutput'))")
    page.tab.get_by_test_id("info-button").click()
    # newer front ends write the node's name above the page, too
    page.tab.locator(".node-help-content h1", has_text="Stream To Video").wait_for(timeout=20_000)
    picture = page.tab.locator(".node-help-content img").first
    assert picture.get_attribute("src") == "/extensions/ComfyUI-AdaState/docs/images/AdaStateStreamOutput.png"
    page.tab.wait_for_function("(img) => img.complete && img.naturalWidth > 0", arg=picture.element_handle())
    page.screenshot(artefacts / "help.png")
    # It asks for a translation first, and takes the page itself when there is none.
    assert [text for text in page.complaints if "/en.md" not in text] == []
