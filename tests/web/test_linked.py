"""STATE linked in the page after a run, on the graph itself and through a subgraph: it is never empty."""

from __future__ import annotations

import json
import time

import pytest
from test_workflows import _RUN

LENGTH = 33
_SET = """([length, prefix, keepState]) => {
  const set = (type, name, value) => {
    const node = app.graph.nodes.find((node) => node.type === type);
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  set("AdaStateRollout", "length", length);
  set("AdaStateRollout", "keep_latents", true);
  set("AdaStateStreamOutput", "filename_prefix", prefix);
  set("AdaStateStreamOutput", "keep_state", keepState);
}"""
# links STATE of the rollout, or of the subgraph that it is in, to a new Save Rollout State
_LINK = """(prefix) => {
  const saver = LiteGraph.createNode("AdaStateSaveState");
  app.graph.add(saver);
  saver.widgets.find((widget) => widget.name === "filename_prefix").value = prefix;
  const gives = (node) => node.outputs?.findIndex((output) => output.type === "ADASTATE_STATE") ?? -1;
  const from = app.graph.nodes.find((node) => gives(node) >= 0);
  return from.connect(gives(from), saver, 0) !== null;
}"""
_UNLINK = """() => app.graph.remove(app.graph.nodes.find((node) => node.type === "AdaStateSaveState"))"""
_FOLD = """() => {
  const rollout = app.graph.nodes.find((node) => node.type === "AdaStateRollout");
  const { node } = app.graph.convertToSubgraph(new Set([rollout]));
  return node.isSubgraphNode();
}"""


class Graph:
    """long_video in the page; every run gives the rollout's report (None if it was replayed) and the saved state's text."""

    def __init__(self, page, host, folders, name: str, keep_state: bool) -> None:
        self.page, self.host, self.videos = page, host, folders["output"] / "linked"
        page.open_template("long_video")
        page.tab.evaluate(_SET, [LENGTH, f"linked/{name}", keep_state])
        self.name = name

    def link(self) -> None:
        assert self.page.tab.evaluate(_LINK, f"linked/{self.name}")

    def run(self) -> tuple[dict | None, str | None]:
        end, detail = self.page.tab.evaluate(_RUN)
        assert end == "execution_success", detail
        prompt, until = detail["prompt_id"], time.monotonic() + 30
        while prompt not in (history := self.host.request(f"/history/{prompt}")):  # listed just after the page is told
            assert time.monotonic() < until
            time.sleep(0.1)
        outputs = history[prompt]["outputs"]
        reports = [json.loads(each["adastate_report"][0]) for each in outputs.values() if "adastate_report" in each]
        [text] = [each["text"][0] for each in outputs.values() if "text" in each] or [None]
        return next((each for each in reports if each["prompt_id"] == prompt), None), text

    def written(self) -> int:
        return len(list(self.videos.glob(f"{self.name}_*.mp4")))


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2, offset=1)
def test_a_state_that_is_linked_after_the_run_is_made_by_running_again(renderer, open_front_end, host, folders):
    graph = Graph(open_front_end(renderer), host, folders, renderer, keep_state=False)
    report, _ = graph.run()
    assert "STATE was not linked" in report["not_made"]["STATE"] and report["state_bytes"] is None
    graph.link()
    report, text = graph.run()
    assert "STATE" not in report["not_made"] and report["state_bytes"] > 0
    assert f"RolloutState(9 latents = {LENGTH} frames" in text and graph.written() == 2
    graph.page.tab.evaluate(_UNLINK)
    report, _ = graph.run()
    assert report is None and graph.written() == 2
    assert graph.page.complaints == []


def test_through_a_subgraph_it_is_taken_from_the_state_that_is_kept(open_front_end, host, folders):
    graph = Graph(open_front_end("classic"), host, folders, "folded", keep_state=True)
    graph.link()
    assert graph.page.tab.evaluate(_FOLD)
    graph.page.tab.evaluate(_UNLINK)
    [rollout] = [name for name, node in graph.page.prompt().items() if node["class_type"] == "AdaStateRollout"]
    assert ":" in rollout
    report, _ = graph.run()
    assert set(report["not_made"]) == {"LATENT", "STATE"}
    graph.link()
    report, text = graph.run()
    assert set(report["not_made"]) == {"LATENT"} and "nothing was made again" in report["warnings"][-1]
    assert f"RolloutState(9 latents = {LENGTH} frames" in text and graph.written() == 1
    assert graph.page.complaints == []
