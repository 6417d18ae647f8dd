"""What a rollout node shows while it runs, in a real browser: preview, meters, stopping, reloading."""

from __future__ import annotations

import time
import urllib.parse
import urllib.request

import av
import pytest

LONG, SHORT = 1201, 33
_SET_LENGTH = """(length) => {
  const node = app.graph.nodes.find((node) => node.type === "AdaStateRollout");
  node.widgets.find((widget) => widget.name === "length").value = length;
}"""
_RUNNING = "async () => (await (await app.api.fetchApi('/queue')).json()).queue_running.length"
_SOURCES = """() => new Promise((done) => {
  const seen = new Set();
  const end = Date.now() + 15000;
  const look = () => {
    const url = document.querySelector(".adastate-preview")?.getAttribute("src");
    if (url) seen.add(url);
    if (seen.size >= 3 || Date.now() > end) done(seen.size); else setTimeout(look, 40);
  };
  look();
})"""


def start(page, length: int) -> None:
    page.tab.evaluate(_SET_LENGTH, length)
    page.tab.evaluate("() => app.queuePrompt(0)")


def shown(page, outcome: str, seconds: float = 90) -> None:
    page.tab.wait_for_selector(f'.adastate-live[data-outcome="{outcome}"]', timeout=1000 * seconds, state="attached")


def chunks(page) -> int:
    return page.tab.locator(".adastate-strip button").count()


def wait_for_chunks(page, count: int) -> None:
    page.tab.wait_for_function(
        "(n) => document.querySelectorAll('.adastate-strip button').length >= n", arg=count, timeout=90_000
    )


def end_all(page) -> None:
    """Stop whatever still runs, so that the next test finds an idle server."""
    page.tab.evaluate("() => app.api.fetchApi('/interrupt', { method: 'POST' })")
    wait_idle(page)


def wait_idle(page, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while page.tab.evaluate(_RUNNING):
        assert time.monotonic() < end, "the server is still busy"
        page.tab.wait_for_timeout(200)


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2, offset=1)
def test_a_run_is_watched_stopped_kept_and_run_again(renderer, open_front_end, host, folders, artefacts):
    page = open_front_end(renderer)
    page.open_template("long_video")
    idle = page.prompt()
    start(page, LONG)
    shown(page, "running")
    wait_for_chunks(page, 3)
    assert page.tab.evaluate(_SOURCES) >= 3  # the preview plays
    page.tab.wait_for_function(
        "() => [...document.querySelectorAll('.adastate-meter polyline')]"
        ".every((line) => line.getAttribute('points').split(' ').length > 1)",
        timeout=60_000,
    )
    assert page.tab.locator(".adastate-meter").count() == 4
    text = page.tab.locator(".adastate-numbers").inner_text()
    assert "of 75.1 s" in text and "× real time" in text and "left" in text and "MiB" in text
    page.screenshot(artefacts / f"live_{renderer}_running.png")

    page.tab.locator(".adastate-strip button").first.click()
    assert page.tab.locator(".adastate-preview").get_attribute("alt") == "Frames of chunk 1"
    page.tab.keyboard.press("ArrowRight")
    pressed = page.tab.locator('.adastate-strip button[aria-pressed="true"]')
    assert pressed.get_attribute("aria-label").startswith("Chunk 2,")
    page.tab.get_by_role("button", name="Follow").click()
    assert pressed.count() == 0

    page.tab.get_by_role("button", name="Stop and keep").click()
    shown(page, "stopped")
    assert page.tab.get_by_role("button", name="Stop and keep").is_disabled()
    wait_idle(page)
    outputs = newest(host)["outputs"]["5"]
    file = outputs["images"][0]
    with av.open(str(folders["output"] / file["subfolder"] / file["filename"])) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert 9 <= frames < LONG and f'"frame": {frames}' in outputs["adastate_report"][0]
    page.screenshot(artefacts / f"live_{renderer}_stopped.png")

    # nothing that is shown becomes an input: the host would run a finished rollout again for it
    assert {**page.prompt()["5"]["inputs"], "length": 0} == {**idle["5"]["inputs"], "length": 0}
    start(page, SHORT)
    shown(page, "done")
    assert chunks(page) == 3
    page.screenshot(artefacts / f"live_{renderer}_done.png")
    assert page.complaints == []


def newest(host) -> dict:
    return max(host.request("/history").values(), key=lambda entry: entry["prompt"][0])


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2)
def test_a_reloaded_page_picks_the_run_up(renderer, open_front_end, artefacts):
    page = open_front_end(renderer)
    page.open_template("long_video")
    start(page, LONG)
    shown(page, "running")
    wait_for_chunks(page, 3)
    page.tab.wait_for_timeout(1500)  # the front end keeps the open workflow for a reload with a delay
    page.tab.reload()
    page.tab.wait_for_selector('.adastate-live[data-outcome="running"]', timeout=90_000, state="attached")
    before = chunks(page)
    assert before >= 3
    wait_for_chunks(page, before + 1)
    assert page.tab.locator(".adastate-strip button").first.get_attribute("aria-label").startswith("Chunk 1,")
    page.screenshot(artefacts / f"live_{renderer}_reloaded.png")
    end_all(page)
    shown(page, "failed")
    assert page.complaints == []


def test_two_tabs_and_two_rollouts_are_kept_apart(open_front_end, host):
    mine, other = open_front_end("classic"), open_front_end("classic")
    for page in (mine, other):
        page.open_template("save_and_resume")
    mine.tab.evaluate(
        """() => { for (const node of app.graph.nodes.filter((node) => node.type === "AdaStateRollout"))
          node.widgets.find((widget) => widget.name === "length").value =
            node.inputs.find((input) => input.name === "resume").link != null ? 49 : 33; }"""
    )
    mine.tab.evaluate("() => app.queuePrompt(0)")
    mine.tab.wait_for_function(
        "() => document.querySelectorAll('.adastate-live[data-outcome=done]').length === 2", timeout=120_000
    )
    numbers = mine.tab.locator(".adastate-numbers").all_inner_texts()
    assert sorted(text.split(" · ")[0] for text in numbers) == ["2.1 of 2.1 s", "3.1 of 3.1 s"]
    assert other.tab.locator(".adastate-live[data-outcome]").count() == 0
    assert mine.complaints == [] and other.complaints == []


def test_the_style_sheet_and_modules_are_served(host):
    for name in ("adastate.js", "css/adastate.css", "js/view.js"):
        with urllib.request.urlopen(
            f"http://127.0.0.1:{host.port}/extensions/ComfyUI-AdaState/{urllib.parse.quote(name)}"
        ) as answer:
            assert answer.status == 200
