"""What the front end shows of the nodes' texts is what the nodes say, though they pass through its message format."""

from __future__ import annotations

_SHOWN = """() => Object.values(LiteGraph.registered_node_types)
  .filter((type) => type.nodeData?.name?.startsWith("AdaState"))
  .map((type) => {
    const node = LiteGraph.createNode(type.nodeData.name);
    const tooltips = (node.widgets ?? []).filter((w) => w.tooltip).map((w) => [w.name, w.tooltip]);
    return [type.nodeData.name, type.title, type.nodeData.description, Object.fromEntries(tooltips)];
  })"""


def test_every_text_comes_out_as_it_was_written(open_front_end, host):
    page = open_front_end("classic")
    info = host.request("/object_info")
    shown = page.tab.evaluate(_SHOWN)
    assert {name for name, *_ in shown} == {name for name in info if name.startswith("AdaState")}
    compared = 0
    for name, title, description, tooltips in shown:
        assert (title, description) == (info[name]["display_name"], info[name]["description"])
        groups = info[name]["input"]
        inputs = groups.get("required", {}) | groups.get("optional", {})
        for widget in tooltips.keys() & inputs.keys():
            assert tooltips[widget] == inputs[widget][1]["tooltip"]
            compared += 1
    assert compared > 100
    assert page.complaints == []
