"""A real host with the pack and a real browser; without Chromium or playwright everything here is skipped."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tools.make_workflows import find_browser, open_page, running_browser, running_host

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
        """Load a workflow as the template browser does: from the host, by name."""
        self.tab.evaluate(
            """async (name) => {
                const answer = await app.api.fetchApi(`/workflow_templates/ComfyUI-AdaState/${name}.json`);
                await app.loadGraphData(await answer.json(), true, true, name);
            }""",
            name,
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
