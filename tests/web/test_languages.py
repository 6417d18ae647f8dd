"""The page in Chinese, Japanese and Korean: the panel has every text, and nodes, tooltips and buttons follow the setting."""

from __future__ import annotations

import json
import re

import pytest
from test_panel import Tab

from tools.catalogue import LANGUAGES, LOCALES
from tools.host_client import PACK_NAME
from tools.make_workflows import open_page

# Texts of the panel that are alike in every language: names, formats and the values of an input.
ALIKE = {"tab", "runOf", "cache", "clock", "meter", "transitions", "steerWords", "steerFailed"}
_SAID = """async ([folder, languages]) => {
  const numbers = [[3, 7, 2], [0, 0, 0], [95.5, 130.25, 1], [1, 6, 4e9], [95.5, null, null]];
  const words = [["w1", "w2", "w3"]];
  const fits = (text, given) => { try { text(...given); return true; } catch { return false; } };
  const samples = (text) => (fits(text, numbers[0]) ? numbers.filter((given) => fits(text, given)) : words);
  const said = (text, english) => {
    if (typeof text === "function") return { arity: text.length, said: samples(english).map((given) => text(...given)) };
    if (typeof text !== "object") return text;
    return Object.fromEntries(Object.entries(text).map(([key, value]) => [key, said(value, english?.[key])]));
  };
  const english = (await import(`${folder}/texts.js?fresh`)).TEXTS;
  const found = { en: said(english, english) };
  for (const language of languages)
    found[language] = said((await import(`${folder}/texts_${language}.js`))[language.toUpperCase()], english);
  const { speak } = await import(`${folder}/language.js`);
  const { TEXTS } = await import(`${folder}/texts.js`);
  for (const locale of [...languages, "fr"]) {
    speak(locale);
    found[`spoken ${locale}`] = said(TEXTS, english);
  }
  return found;
}"""
_MAKE = """async () => {
  app.graph.clear();
  for (const [type, x] of [["AdaStateRollout", 300], ["AdaStateStreamOutput", 750]]) {
    const node = LiteGraph.createNode(type);
    node.pos = [x, 120];
    app.graph.add(node);
  }
  await app.loadGraphData(app.graph.serialize());
}"""
_SHOWN = """() => Object.fromEntries(app.graph.nodes.map((node) => [node.type, {
  title: node.title,
  inputs: node.inputs.map((slot) => [slot.name, slot.label ?? slot.localized_name]),
  outputs: node.outputs.map((slot) => slot.localized_name),
  widgets: (node.widgets ?? []).filter((widget) => node.inputs.some((slot) => slot.name === widget.name))
    .map((widget) => [widget.name, widget.label]),
}]))"""
_SET = "(locale) => app.extensionManager.setting.set('Comfy.Locale', locale)"
_TOLD = """(title) => {
  const page = document.querySelector("#vue-app").__vue_app__;
  return page.config.globalProperties.$t("nodeDefs.AdaStateRollout.display_name") === title;
}"""
_OVER = """(name) => {
  const node = app.graph.nodes.find((node) => node.type === "AdaStateRollout");
  const widget = node.widgets.find((widget) => widget.name === name);
  const place = () => app.canvas.ds.convertOffsetToCanvas([node.pos[0] + 60, node.pos[1] + widget.y + 10]);
  app.canvas.ds.offset[1] += (200 - place()[1]) / app.canvas.ds.scale; // clear of the bottom panel
  app.canvas.draw(true, true);
  const [x, y] = place();
  const box = app.canvas.canvas.getBoundingClientRect();
  return [box.x + x, box.y + y];
}"""


def flat(texts: dict, prefix: str = "") -> dict[str, str | list]:
    """Every text by its path; a function is what it said to the samples."""
    found = {}
    for key, value in texts.items():
        if isinstance(value, dict) and "said" not in value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def facts(text: str) -> set[str]:
    """What a translation has to repeat: numbers and the names of inputs."""
    return set(re.findall(r"\d+(?:\.\d+)?|[a-z]+_[a-z_]+", text))


def test_the_panel_says_the_same_in_every_language(browser, host):
    folder = f"http://127.0.0.1:{host.port}/extensions/{PACK_NAME}/js"
    tab = browser.new_page()
    tab.goto(f"{folder}/texts.js")
    said = {name: flat(texts) for name, texts in tab.evaluate(_SAID, [folder, list(LANGUAGES)]).items()}
    tab.close()
    english = said["en"]
    assert said["spoken fr"] == english
    for language in LANGUAGES:
        own = said[language]
        assert said[f"spoken {language}"] == own and list(own) == list(english)
        for key, text in english.items():
            alike = key.partition(".")[0] in ALIKE
            if isinstance(text, str):
                assert (own[key] != text or alike) and facts(text) <= facts(own[key]), key
                continue
            assert own[key]["arity"] == text["arity"] and (own[key] != text or alike), key
            for there, here in zip(text["said"], own[key]["said"], strict=True):
                assert facts(there) <= facts(here), (key, there, here)


class Shown:
    """What a page in a language is held to: the files that the host was given."""

    def __init__(self, page, language: str):
        self.page, self.language = page, language
        self.nodes = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))

    def holds(self) -> None:
        tab = self.page.tab
        tab.wait_for_function(_TOLD, arg=self.nodes["AdaStateRollout"]["display_name"])
        # the front end names nodes anew at a change, but may do so before it has loaded the language
        tab.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
        tab.evaluate(_MAKE)
        for name, node in tab.evaluate(_SHOWN).items():
            own = self.nodes[name]
            assert node["title"] == own["display_name"]
            for slot, label in node["inputs"] + node["widgets"]:
                assert label == own["inputs"][slot]["name"], slot
            # an output that is named after its type has the front end's own word for that
            states = [(i, label) for i, label in enumerate(node["outputs"]) if own["outputs"][str(i)]["name"] == label]
            assert states, name

    def tooltip(self, name: str) -> None:
        tab = self.page.tab
        x, y = tab.evaluate(_OVER, name)
        tab.mouse.move(x - 5, y)
        tab.mouse.move(x, y)
        bubble = tab.locator(".node-tooltip")
        bubble.wait_for()
        assert bubble.text_content().strip() == self.nodes["AdaStateRollout"]["inputs"][name]["tooltip"]

    def buttons(self, *names: str) -> None:
        panel = self.page.tab.locator(".adastate-panel")
        for name in names:
            panel.get_by_role("button", name=name, exact=True).wait_for()


@pytest.fixture
def page(open_front_end):
    """A page whose language is English again at the end."""
    page = open_front_end("classic")
    yield page
    page.tab.evaluate(_SET, "en")


def test_nodes_tooltips_and_buttons_follow_the_setting(page, host, artefacts):
    tab = page.tab
    Tab(page)
    buttons = {
        "zh": ("停止并保留", "延长", "从这里用新种子重做"),
        "ja": ("停止して残す", "延長", "ここから新しいシードでやり直す"),
        "ko": ("멈추고 보관", "연장", "여기부터 새 시드로 다시 만들기"),
    }
    for language, names in buttons.items():
        tab.evaluate(_SET, language)
        if language == "zh":  # a page that is opened in a language; the others are chosen while it is open
            open_page(tab, host.port)
            Tab(page)
        shown = Shown(page, language)
        shown.holds()
        shown.buttons(*names)
        shown.tooltip("window_frames")
        page.screenshot(artefacts / f"language-{language}.png")
    assert page.complaints == []
