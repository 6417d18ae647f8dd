"""A real host with the pack and a real browser; without Chromium or playwright everything here is skipped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path

import pytest

from tools.make_workflows import find_browser, open_page, running_browser, running_host
from tools.workflow_titles import TITLES

pytest_plugins = ["sampled", "ended"]
ROOT = Path(__file__).resolve().parents[2]
OURS = re.compile("adastate", re.I)
# The front end asks the public registry about nodes it does not know; a host without API nodes forbids that.
REGISTRY_LOOKUP = "Content Security Policy"


@pytest.fixture(scope="session")
def browser():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if find_browser() is None:
        pytest.skip("no Chromium: install chromium, chromium-browser or google-chrome, or set CHROMIUM to its path")
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def host(browser, tmp_path_factory):
    """The server; it depends on the browser so that nothing is booted without one."""
    folder = tmp_path_factory.mktemp("host")
    with running_host(folder) as server:
        yield server


@pytest.fixture(scope="session")
def folders(host) -> dict[str, Path]:
    """The host's folders by the name that its history gives them."""
    return {kind: host.log.parent / kind for kind in ("output", "temp")}


@pytest.fixture(scope="session")
def artefacts() -> Path:
    """Where screenshots go, to be looked at."""
    folder = Path(os.environ.get("ADASTATE_ARTEFACTS") or ROOT / ".cache" / "screenshots").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Page:
    """The front end in a tab of its own, and what it complained of that concerns the pack."""

    def __init__(self, tab, host, renderer: str):
        self.tab, self.complaints = tab, []
        tab.on("console", lambda message: message.type == "error" and self._note(message.text, message.location))
        tab.on("pageerror", lambda error: self._note(str(error), error.stack))
        open_page(tab, host.port)
        vue = "Comfy.VueNodes.Enabled"
        if tab.evaluate("(name) => app.extensionManager.setting.get(name)", vue) != (renderer == "vue"):
            tab.evaluate("([name, on]) => app.extensionManager.setting.set(name, on)", [vue, renderer == "vue"])
            open_page(tab, host.port)

    def _note(self, text: str, place: object) -> None:
        if REGISTRY_LOOKUP not in text and OURS.search(f"{text} {place}"):
            self.complaints.append(f"{text} {place}")

    def open_template(self, name: str) -> None:
        """Load a workflow as the template browser does: from the host, by its title. `name` is that of its API twin."""
        self.tab.evaluate(
            """async (title) => {
                const answer = await app.api.fetchApi(`/workflow_templates/ComfyUI-AdaState/${title}.json`);
                await app.loadGraphData(await answer.json(), true, true, title);
            }""",
            TITLES[name],
        )

    def prompt(self) -> dict:
        """What pressing Run would send: class types and inputs by node id."""
        output = self.tab.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)")
        return without_titles(json.loads(output))

    def screenshot(self, path: Path) -> None:
        """What the user sees, once all of it is drawn."""
        self.tab.wait_for_timeout(1500)
        self.tab.screenshot(path=path)


def without_titles(prompt: dict) -> dict:
    """An API prompt's nodes without `_meta`, which is for people."""
    return {name: {"class_type": node["class_type"], "inputs": node["inputs"]} for name, node in prompt.items()}


def end_runs(host) -> None:
    """A test that failed in the middle of a run leaves it to no other test."""
    waiting = host.request("/queue")
    if not (waiting["queue_running"] or waiting["queue_pending"]):
        return
    until = time.monotonic() + 60
    while host.request("/queue")["queue_running"] and time.monotonic() < until:
        for path, body in (("/queue", {"clear": True}), ("/interrupt", {})):
            with contextlib.suppress(ValueError):  # the answers are empty
                host.request(path, body)
        time.sleep(0.2)


@pytest.fixture
def open_front_end(browser, host):
    """Opens the front end with the "classic" or the "vue" renderer; the tab is closed at the end."""
    tabs = []

    def open_(renderer: str) -> Page:
        tabs.append(browser.new_page(viewport={"width": 1600, "height": 900}))
        return Page(tabs[-1], host, renderer)

    yield open_
    for tab in tabs:
        tab.close()
    end_runs(host)
