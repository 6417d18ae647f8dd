"""The bottom panel's tab in a real browser: a run on its timeline, going on with it, and prompts edited both ways."""

from __future__ import annotations

import json
import re
import time

import av
import numpy as np
import pytest
from test_live import LONG, end_all, newest, start, wait_idle

OPEN = "() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.adastate')"
SET = """([type, name, value]) => {
  const node = app.graph.nodes.find((node) => node.type === type);
  const widget = node.widgets.find((widget) => widget.name === name);
  widget.value = value;
  widget.callback?.(value);
}"""
GET = """([type, name]) => {
  const node = app.graph.nodes.find((node) => node.type === type);
  return node.widgets.find((widget) => widget.name === name).value;
}"""


class Tab:
    """The tab of the bottom panel, opened."""

    def __init__(self, page):
        self.page = page
        page.tab.evaluate(OPEN)
        self.element = page.tab.locator(".adastate-panel")
        self.element.wait_for()

    def button(self, name: str):
        return self.element.get_by_role("button", name=name, exact=True)

    @property
    def chunks(self):
        return self.element.locator(".adastate-chunks button")

    @property
    def marks(self):
        return self.element.locator(".adastate-mark")

    def until(self, outcome: str, seconds: float = 90) -> None:
        self.page.tab.wait_for_selector(f'.adastate-panel[data-outcome="{outcome}"]', timeout=1000 * seconds)

    def until_chunks(self, count: int) -> None:
        self.page.tab.wait_for_function(
            "(n) => document.querySelectorAll('.adastate-chunks button').length >= n", arg=count, timeout=90_000
        )

    def choose(self, chunk: int) -> None:
        self.chunks.nth(chunk).click()

    def run_again(self, name: str, host) -> None:
        """Press a button that queues, and wait until what comes of it is over."""
        before = len(host.request("/history"))
        self.button(name).click()
        end = time.monotonic() + 120
        while len(host.request("/history")) == before:
            assert time.monotonic() < end, "nothing was run"
            self.page.tab.wait_for_timeout(300)


def frames_of(path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def video(host, folders, node: str = "5") -> list[np.ndarray]:
    entry = newest(host)
    assert entry["status"]["status_str"] == "success", entry["status"]
    file = entry["outputs"][node]["images"][0]
    return frames_of(folders["output"] / file["subfolder"] / file["filename"])


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2)
def test_a_run_on_the_timeline_is_stopped_and_extended(renderer, open_front_end, host, folders, artefacts):
    page = open_front_end(renderer)
    page.open_template("long_video")
    tab = Tab(page)
    assert tab.button("Extend").is_disabled() and tab.button("Stop and keep").is_disabled()
    start(page, LONG)
    tab.until("running")
    tab.until_chunks(6)
    assert "of 75.1 s" in tab.element.locator(".adastate-numbers").inner_text()
    assert tab.element.locator(".adastate-film-chunks .adastate-cell").count() >= 1
    page.screenshot(artefacts / f"panel_{renderer}_running.png")
    tab.choose(0)
    page.tab.keyboard.press("ArrowRight")
    assert (
        tab.element.locator('.adastate-chunks button[aria-pressed="true"]').get_attribute("title").startswith("Chunk 2")
    )
    assert "history_chunks" not in tab.button("Redo from here with a new seed").get_attribute("title")

    tab.button("Stop and keep").click()
    tab.until("stopped")
    page.tab.wait_for_timeout(500)
    assert tab.button("Redo from here with a new seed").is_disabled()
    assert "history_chunks" in tab.button("Redo from here with a new seed").get_attribute("title")
    first = video(host, folders)
    tab.element.get_by_label("Seconds of video to add").fill("2")
    tab.run_again("Extend", host)
    tab.until("done")
    whole = video(host, folders)
    assert len(whole) == len(first) + 32
    prompt = page.prompt()
    loader = next(node for node in prompt.values() if node["class_type"] == "AdaStateLoadState")
    assert loader["inputs"]["file"].endswith(".state.safetensors [output]") and loader["inputs"]["chunk"] == -1
    assert prompt["4"]["inputs"]["join"] is True and prompt["5"]["inputs"]["length"] == len(whole)
    page.screenshot(artefacts / f"panel_{renderer}_extended.png")
    assert page.complaints == []


@pytest.mark.parametrize(("renderer", "keep_state"), [("classic", True), ("vue", False)])
@pytest.mark.sampled(2, offset=1)
def test_a_whole_run_is_extended_as_the_tab_said(renderer, keep_state, open_front_end, host, folders, artefacts):
    """With its state the new frames are put behind the old ones; without it all of them are made again."""
    page = open_front_end(renderer)
    page.open_template("long_video")
    assert page.tab.evaluate(GET, ["AdaStateStreamOutput", "keep_state"]) is True
    page.tab.evaluate(SET, ["AdaStateStreamOutput", "keep_state", keep_state])
    tab = Tab(page)
    start(page, 213)
    tab.until("running")
    tab.until_chunks(2)
    sentence = (
        "Extend will go on from the end" if keep_state else "Extend will make everything again: keep_state is off"
    )
    status = tab.element.locator(".adastate-status")
    assert sentence in status.inner_text() and "keep_state" in status.get_attribute("title")
    assert sentence in tab.button("Extend").get_attribute("title")
    assert "state saved every 1 min 0 s" in tab.element.locator(".adastate-numbers").inner_text()
    page.screenshot(artefacts / f"panel_{renderer}_extend_{'on' if keep_state else 'again'}.png")
    tab.until("done")
    page.tab.wait_for_timeout(500)
    first = video(host, folders)
    hint = tab.button("Extend").get_attribute("title")
    assert ("Goes on from the saved state" in hint) == keep_state and (
        "keep_state on Stream To Video" in hint
    ) != keep_state
    tab.element.get_by_label("Seconds of video to add").fill("2")
    tab.run_again("Extend", host)
    tab.until("done")
    page.tab.wait_for_timeout(500)
    whole = video(host, folders)
    assert (len(first), len(whole)) == (213, 245)
    same = [(a == b).all() for a, b in zip(first, whole, strict=False)]
    assert all(same), "the beginning is that of the first video either way"
    run = newest(host)
    made = json.loads(run["outputs"]["5"]["adastate_report"][0])
    assert made["frames"] == (32 if keep_state else 245)
    loaders = [node for node in page.prompt().values() if node["class_type"] == "AdaStateLoadState"]
    assert len(loaders) == keep_state
    assert page.complaints == []


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2, offset=1)
def test_a_page_that_is_reloaded_finds_the_run_on_its_timeline(renderer, open_front_end, artefacts):
    page = open_front_end(renderer)
    page.open_template("long_video")
    tab = Tab(page)
    start(page, LONG)
    tab.until("running")
    tab.until_chunks(4)
    page.tab.wait_for_timeout(1500)  # the front end keeps the open workflow for a reload with a delay
    page.tab.reload()
    page.tab.wait_for_selector('.adastate-live[data-outcome="running"]', timeout=90_000, state="attached")
    if not tab.element.is_visible():
        tab = Tab(page)
    tab.until("running")
    before = tab.chunks.count()
    assert before >= 4 and tab.chunks.first.get_attribute("title").startswith("Chunk 1")
    tab.until_chunks(before + 2)
    assert tab.element.locator(".adastate-film-chunks .adastate-cell").count() >= 1
    page.screenshot(artefacts / f"panel_{renderer}_reloaded.png")
    tab.button("Stop and keep").click()
    tab.until("stopped")
    wait_idle(page)
    assert page.complaints == []


def test_the_switch_of_an_absorption_is_marked_where_it_happened(open_front_end, artefacts):
    page = open_front_end("classic")
    page.open_template("absorption")
    tab = Tab(page)
    start(page, 141)
    tab.until("done")
    mark = tab.element.locator(".adastate-switch")
    mark.wait_for(state="visible")
    # the workflow's 24 latent frames of warm-up are 93 pictures, 8 chunks
    assert mark.get_attribute("aria-label").startswith("From 5.8 s on")
    edge = tab.chunks.nth(8).bounding_box()["x"]
    assert abs(mark.bounding_box()["x"] - edge) <= 3
    page.screenshot(artefacts / "panel_classic_absorption.png")
    assert page.complaints == []


def test_a_chunk_is_made_again_with_a_new_seed(open_front_end, host, folders, artefacts):
    page = open_front_end("classic")
    page.open_template("long_video")
    page.tab.evaluate(SET, ["AdaStateStreamOutput", "history_chunks", 2])
    tab = Tab(page)
    start(page, 93)
    tab.until("done")
    page.tab.wait_for_timeout(500)
    first = video(host, folders)
    seed = page.tab.evaluate(GET, ["AdaStateRollout", "seed"])
    tab.choose(4)
    redo = tab.button("Redo from here with a new seed")
    assert "chunk 5 and all behind it" in redo.get_attribute("title")
    page.screenshot(artefacts / "panel_classic_redo.png")
    tab.run_again("Redo from here with a new seed", host)
    again = video(host, folders)
    assert len(first) == len(again) == 93
    assert page.tab.evaluate(GET, ["AdaStateRollout", "seed"]) != seed
    kept = 9 + 12 * 3  # frames of four chunks
    assert all((a == b).all() for a, b in zip(first[:kept], again[:kept], strict=True))
    assert any((a != b).any() for a, b in zip(first[kept:], again[kept:], strict=True))
    assert page.complaints == []


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2)
def test_prompts_are_edited_both_ways(renderer, open_front_end, artefacts):
    page = open_front_end(renderer)
    page.open_template("prompt_timeline")
    tab = Tab(page)
    text = page.tab.evaluate(GET, ["AdaStateDemoTimeline", "text"])
    page.tab.wait_for_function("() => document.querySelectorAll('.adastate-mark').length > 1")
    count = tab.marks.count()
    start(page, 193)
    tab.until("running")
    tab.until_chunks(10)
    page.screenshot(artefacts / f"panel_{renderer}_prompts.png")
    end_all(page)

    tab.marks.nth(1).click()
    words = tab.element.get_by_label("Prompt", exact=True)
    words.fill("snow, gold balloon")
    node_text = "() => app.graph.nodes.find((node) => node.type === 'AdaStateDemoTimeline').widgets[0].value"
    page.tab.wait_for_function(f"() => ({node_text})().includes('snow, gold balloon')")
    changed = page.tab.evaluate(GET, ["AdaStateDemoTimeline", "text"])
    assert changed.count("{") == text.count("{") and len(changed.splitlines()) == count
    assert page.prompt()["3"]["inputs"]["text"] == changed

    words.fill("a purple cow")
    error = tab.element.get_by_role("alert")
    error.wait_for()
    assert "line 2, column " in error.inner_text()
    assert page.tab.evaluate(GET, ["AdaStateDemoTimeline", "text"]) == changed
    page.screenshot(artefacts / f"panel_{renderer}_error.png")

    page.tab.evaluate(SET, ["AdaStateDemoTimeline", "text", "0:00 meadow\n2s {cut} desert, gold balloon\n8s snow"])
    page.tab.wait_for_function("() => document.querySelectorAll('.adastate-mark').length === 3")
    error.wait_for(state="hidden")
    box = tab.marks.nth(1).bounding_box()
    lane = tab.element.locator(".adastate-prompts").bounding_box()
    second = lane["width"] / (193 / 16)
    page.tab.mouse.move(box["x"] + 10, box["y"] + 8)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 10 + 2 * second, box["y"] + 8, steps=5)
    page.tab.mouse.up()
    page.tab.wait_for_function(f"() => ({node_text})().includes('4s {{cut}} desert, gold balloon')")
    tab.marks.nth(1).focus()
    page.tab.keyboard.press("Shift+ArrowRight")
    page.tab.wait_for_function(f"() => ({node_text})().includes('4.25s {{cut}}')")
    tab.button("Add").click()
    page.tab.wait_for_function("() => document.querySelectorAll('.adastate-mark').length === 4")
    tab.button("Remove").click()
    page.tab.wait_for_function("() => document.querySelectorAll('.adastate-mark').length === 3")
    page.tab.wait_for_function(f"() => ({node_text})().split('\\n').length === 3")
    assert json.dumps(page.prompt()).count("4.25s {cut} desert, gold balloon") == 1
    assert page.complaints == []


def test_several_rollouts_of_a_graph_can_be_chosen(open_front_end, artefacts):
    page = open_front_end("classic")
    page.open_template("save_and_resume")
    tab = Tab(page)
    choice = tab.element.get_by_label("Rollout", exact=True)
    page.tab.wait_for_function("() => document.querySelectorAll('.adastate-run option').length === 2")
    names = choice.locator("option").all_inner_texts()
    assert len(set(names)) == 2 and all(name.endswith("not run yet") for name in names)
    page.tab.evaluate(
        """() => { for (const node of app.graph.nodes.filter((node) => node.type === "AdaStateRollout"))
          node.widgets.find((widget) => widget.name === "length").value =
            node.inputs.find((input) => input.name === "resume").link != null ? 45 : 33; }"""
    )
    page.tab.evaluate("() => app.queuePrompt(0)")
    page.tab.wait_for_function(
        "() => [...document.querySelectorAll('.adastate-run option')].filter((o) => o.text.endsWith('done')).length === 2",
        timeout=90_000,
    )
    made = set()
    for value in choice.locator("option").evaluate_all("(options) => options.map((option) => option.value)"):
        choice.select_option(value)
        page.tab.wait_for_timeout(300)
        made.add(tab.element.locator(".adastate-numbers").inner_text().split(" · ")[0])
    assert made == {"2.1 of 2.1 s", "2.8 of 2.8 s"}
    page.screenshot(artefacts / "panel_classic_several.png")
    assert page.complaints == []


def test_a_run_without_an_end_says_what_is_made_and_is_redone_without_one(open_front_end, host, artefacts):
    page = open_front_end("vue")
    page.open_template("long_video")
    tab = Tab(page)
    for typed, taken in ((480, 481), (82, 81), (-1, -1), (-3, -1), (4, 5), (0, 0)):
        page.tab.evaluate(SET, ["AdaStateRollout", "length", typed])
        assert page.prompt()["5"]["inputs"]["length"] == taken
    start(page, 0)
    tab.until("running")
    tab.until_chunks(6)
    numbers = tab.element.locator(".adastate-numbers").inner_text()
    assert re.match(r"0:\d\d made · ", numbers) and "left" not in numbers and " of " not in numbers, numbers
    assert page.tab.locator(".adastate-live .adastate-numbers").inner_text().split(" · ")[0].endswith(" made")
    assert page.tab.locator(".adastate-live progress").get_attribute("value") is None
    ticks = tab.element.locator(".adastate-tick").all_inner_texts()
    last = tab.chunks.last.bounding_box()
    lane = tab.element.locator(".adastate-chunks").bounding_box()
    assert ticks[0] == "0:00" and last["x"] + last["width"] <= lane["x"] + lane["width"] + 1
    assert "It rolls until it is stopped" in tab.element.locator(".adastate-status").inner_text()
    page.screenshot(artefacts / "panel_vue_endless.png")
    tab.button("Stop and keep").click()
    tab.until("stopped")
    page.tab.wait_for_timeout(500)
    tab.choose(0)
    tab.button("Redo from here with a new seed").click()
    tab.until("running")
    assert page.prompt()["5"]["inputs"]["length"] == 0
    tab.until_chunks(2)
    tab.button("Stop and keep").click()
    tab.until("stopped")
    wait_idle(page)
    report = json.loads(newest(host)["outputs"]["5"]["adastate_report"][0])
    assert report["stopped"]["of"] is None and page.complaints == []
