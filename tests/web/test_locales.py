"""What the front end's messages make of the nodes' texts is what the nodes say, though some hold its special characters."""

from __future__ import annotations

_TITLES = """() => Object.values(LiteGraph.registered_node_types)
  .filter((type) => type.nodeData?.name?.startsWith("AdaState"))
  .map((type) => [type.nodeData.name, type.title, type.nodeData.description])"""
_MESSAGES = """(keys) => {
  const app = [...document.querySelectorAll("*")].find((element) => element.__vue_app__).__vue_app__;
  return keys.map((key) => app.config.globalProperties.$t(key));
}"""


def tooltips(info: dict) -> dict[str, str]:
    """Message key -> the tooltip that a node gives an input or output."""
    found = {}
    for name in (name for name in info if name.startswith("AdaState")):
        groups = info[name]["input"]
        for slot, (_, options) in (groups.get("required", {}) | groups.get("optional", {})).items():
            found[f"nodeDefs.{name}.inputs.{slot}.tooltip"] = options["tooltip"]
        for i, tooltip in enumerate(info[name]["output_tooltips"]):
            found[f"nodeDefs.{name}.outputs.{i}.tooltip"] = tooltip
    return found


def test_every_text_comes_out_as_it_was_written(open_front_end, host):
    page = open_front_end("classic")
    info = host.request("/object_info")
    shown = page.tab.evaluate(_TITLES)
    assert {name for name, *_ in shown} == {name for name in info if name.startswith("AdaState")}
    for name, title, description in shown:
        assert (title, description) == (info[name]["display_name"], info[name]["description"])
    expected = tooltips(info)
    assert any("|" in text for text in expected.values()) and any("{" in text for text in expected.values())
    assert dict(zip(expected, page.tab.evaluate(_MESSAGES, list(expected)), strict=True)) == expected
    assert page.complaints == []
