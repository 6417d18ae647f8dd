"""Steering a run from the bottom panel's tab, in a real browser: ten changes, two pages, a redo, a last chunk, a pause."""

from __future__ import annotations

import time

import pytest
from test_live import LONG, SHORT, start, wait_idle
from test_panel import GET, SET, Tab, video

TIMELINE = ("AdaStateDemoTimeline", "text")
RUN = "async () => (await (await app.api.fetchApi('/adastate/runs')).json()).runs.at(-1)"
CHUNKS = """async (run) =>
  (await (await app.api.fetchApi(`/adastate/runs/${run.prompt_id}/${run.node_id}`)).json()).chunks"""
# posts changes at once, and leaves their answers to be asked for
POST = """([ids, changes]) => {
  window.answers = Promise.all(changes.map((change) => app.api.fetchApi('/adastate/steer', {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ ...ids, ...change }),
  }).then((answer) => answer.status)));
}"""
# types words and sends them as soon as so many chunks are there, whatever the test's own process is doing
WHEN = """([chunks, words]) => new Promise((done) => {
  const look = () => {
    if (document.querySelectorAll('.adastate-chunks button').length < chunks) return requestAnimationFrame(look);
    const field = document.querySelector('.adastate-steer-prompt');
    field.value = words;
    field.dispatchEvent(new KeyboardEvent('keydown', { key: 'Enter', bubbles: true, cancelable: true }));
    done();
  };
  look();
})"""


class Wheel(Tab):
    """The tab with its row for steering, on the demo's timeline with every chunk's state kept."""

    def __init__(self, page, **settings):
        page.open_template("prompt_timeline")
        page.tab.evaluate(SET, [*TIMELINE, "meadow, slow, crimson balloon"])
        page.tab.evaluate(SET, ["AdaStateStreamOutput", "history_chunks", 1])
        # exact: x264 remembers what it encoded before, and a taken back file goes on with another encoder
        page.tab.evaluate(SET, ["AdaStateStreamOutput", "codec", "ffv1"])
        for name, value in settings.items():
            page.tab.evaluate(SET, ["AdaStateRollout", name, value])
        super().__init__(page)
        self.row = self.element.locator(".adastate-steer")
        self.prompt = self.row.get_by_label("From now on")
        self.alert = self.row.get_by_role("alert")

    @property
    def dots(self):
        return self.element.locator(".adastate-steered-dot")

    @property
    def run(self) -> dict:
        """What the server says of the newest run."""
        return self.page.tab.evaluate(RUN)

    def run_chunks(self) -> list[dict]:
        """What the server says of that run's chunks."""
        return self.page.tab.evaluate(CHUNKS, self.run)

    @property
    def text(self) -> str:
        """The timeline that the graph has."""
        return self.page.tab.evaluate(GET, [*TIMELINE])

    def say(self, words: str, transition: str = "") -> None:
        self.row.get_by_label("Transition").select_option(transition)
        self.prompt.fill(words)
        self.prompt.press("Enter")

    def seed(self, value: int) -> None:
        self.row.get_by_label("Seed", exact=True).fill(str(value))
        self.row.get_by_label("Seed", exact=True).press("Enter")

    def weaken(self) -> None:
        self.row.get_by_label("Strength").press("ArrowLeft")

    def until_done(self, count: int) -> None:
        """Until so many changes were made and none waits, as the server and the row say."""
        until = time.monotonic() + 90
        while True:
            steering = self.run["steering"]
            if len(steering["done"]) >= count and not steering["waiting"]:
                break
            assert time.monotonic() < until, steering
        self.row.locator('.adastate-steer-note[data-waiting="0"]').wait_for(state="attached")


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2)
def test_a_run_is_steered_ten_times_and_what_was_steered_is_kept(renderer, open_front_end, host, folders, artefacts):
    """The page writes a timeline that makes the same video (classic), and goes on from a pause (vue)."""
    page = open_front_end(renderer)
    wheel = Wheel(page)
    start(page, LONG)
    wheel.until("running")
    wheel.until_chunks(3)
    wheel.say("a purple cow")
    wheel.alert.wait_for()
    assert "'a'" in wheel.alert.inner_text() and "the demo model knows" in wheel.alert.inner_text()
    assert wheel.prompt.input_value() == "a purple cow"
    changes = [
        lambda: wheel.say("desert, gold balloon"),
        lambda: wheel.say("lantern", "soft"),
        lambda: wheel.button("Another seed, at random, from the next chunk on").click(),
        wheel.weaken,
        lambda: wheel.seed(11),
        lambda: wheel.say("city, fast", "cut"),
        wheel.weaken,
        lambda: wheel.say("snow", "rope cut"),
        lambda: wheel.button("Take back").click(),
        lambda: wheel.say("violet balloon, no lantern", "flush"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        wheel.until_done(number)
        assert wheel.alert.is_hidden()
        if number == 8:
            wheel.row.get_by_role("status").filter(has_text="first picture after").wait_for()
            page.screenshot(artefacts / f"steer_{renderer}_rolling.png")
    steering = wheel.run["steering"]
    assert all("error" not in change for change in steering["done"]) and steering["seed"] not in (7, 11)
    assert wheel.prompt.input_value() == "" and "{cut} city, fast" in steering["timeline"]
    [taken] = [change for change in steering["done"] if "taken_back" in change]
    places = {change["at"] for change in steering["done"] if change is taken or change["at"] < taken["at"]}
    assert wheel.dots.count() == len(places | {steering["done"][-1]["at"]})

    wheel.button("Pause").click()
    wheel.until("paused")
    wait_idle(page)
    run = wheel.run
    assert wheel.chunks.count() == run["newest"]["chunk"] + 1
    first = video(host, folders)
    assert len(first) == run["newest"]["frames"] and wheel.text == "meadow, slow, crimson balloon"
    page.screenshot(artefacts / f"steer_{renderer}_paused.png")
    timeline = run["steering"]["timeline"]
    if renderer == "classic":
        wheel.button("Keep the steered timeline").click()
        page.tab.wait_for_function(f"(text) => ({GET})({list(TIMELINE)}) === text", arg=timeline)
        assert page.prompt()["3"]["inputs"]["text"] == timeline
        start(page, len(first))
        wheel.until("done")
    else:
        wheel.button("Go on").click()
        wheel.until("running")
        wheel.until_chunks(2)
        assert wheel.text == timeline and page.prompt()["5"]["inputs"]["length"] == LONG
        wheel.button("Stop and keep").click()
        wheel.until("stopped")
    wait_idle(page)
    again = video(host, folders)
    assert len(again) > len(first) if renderer == "vue" else len(again) == len(first)
    assert all((a == b).all() for a, b in zip(first, again, strict=False))
    assert ["/adastate/steer" in complaint for complaint in page.complaints] == [
        True
    ]  # the refused one, by the browser


@pytest.mark.parametrize("renderer", ["classic", "vue"])
@pytest.mark.sampled(2, offset=1)
def test_two_pages_steer_a_redo_and_a_change_in_its_last_chunk_is_answered(renderer, open_front_end, artefacts):
    page, other = open_front_end(renderer), open_front_end(renderer)
    wheel = Wheel(page, width=128, height=128)  # slow enough for its last chunk to be met
    start(page, SHORT + 48)
    wheel.until("running")
    wheel.until_chunks(2)
    wheel.button("Stop and keep").click()
    wheel.until("stopped")
    wait_idle(page)
    wheel.choose(1)
    wheel.button("Redo from here with a new seed").click()
    wheel.until("running")
    wheel.until_chunks(1)
    ids = {name: wheel.run[name] for name in ("prompt_id", "node_id")}
    other.tab.evaluate(POST, [ids, [{"seed": 11}, {"strength": 0.5}]])
    wheel.say("desert, gold balloon")
    assert other.tab.evaluate("() => window.answers") == [200, 200]
    page.tab.evaluate(WHEN, [5, "snow"])
    wheel.until("done")
    wheel.alert.wait_for()
    page.screenshot(artefacts / f"steer_{renderer}_redo.png")
    steering = wheel.run["steering"]
    made = [change for change in steering["done"] if "error" not in change]
    asked = {name: change[name] for change in made for name in ("prompt", "seed", "strength") if name in change}
    assert asked == {"prompt": "desert, gold balloon", "seed": 11, "strength": 0.5} and steering["waiting"] == []
    assert "snow" not in steering["timeline"] and wheel.dots.count() == len({change["at"] for change in made})
    assert wheel.row.get_by_role("status").inner_text().startswith("From ")
    assert page.complaints == [] and other.complaints == []


def test_scenes_are_marked_where_they_begin(open_front_end, artefacts):
    """One that is asked for on the way and one of the timeline: on the axis, on the prompt, and at the chunk's own button."""
    page = open_front_end("classic")
    wheel = Wheel(page, window_frames=6)  # the demo's window of one chunk has no room for a shot's first one
    page.tab.evaluate(SET, [*TIMELINE, "0s meadow, slow, crimson balloon\n3.75s {shot}"])
    planned = wheel.marks.nth(1)
    planned.wait_for()
    assert "adastate-shot" in planned.get_attribute("class") and planned.inner_text() == "{shot}"
    start(page, LONG)
    wheel.until("running")
    wheel.until_chunks(1)
    wheel.say("snow, lantern", "shot")
    wheel.until_done(1)
    wheel.until_chunks(7)
    [asked] = wheel.run["steering"]["done"]
    assert asked["transition"] == "shot" and wheel.run["steering"]["timeline"].endswith("{shot}")
    shots = [chunk for chunk in wheel.run_chunks() if chunk["shot"]]
    assert [(chunk["first_frame"] + 3) // 4 for chunk in shots] == [round(asked["at"] * 4), 15]
    flags = wheel.element.locator(".adastate-shot-flag")
    assert flags.evaluate_all("(all) => all.map((flag) => flag.title)") == [
        f"A new scene begins at {chunk['first_frame'] / 16:.1f} s" for chunk in shots
    ]
    for flag, chunk in zip(flags.all(), shots, strict=True):
        button = wheel.chunks.nth(chunk["chunk"])
        assert button.get_attribute("title").endswith(", a new scene")
        assert abs(flag.bounding_box()["x"] - button.bounding_box()["x"]) <= 3
    page.screenshot(artefacts / "panel_classic_shots.png")
    wheel.button("Stop and keep").click()
    wheel.until("stopped")
    wait_idle(page)
    assert page.complaints == []
