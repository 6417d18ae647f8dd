"""The nodes' texts by language: English is what the nodes say, the others lack nothing, keep every fact, and reach the host."""

from __future__ import annotations

import json
import re

import pytest

from tools.catalogue import FILES, LANGUAGES, LOCALES, PAGE, Catalogue, as_text, english, escaped, page_of, plain
from tools.make_locales import english_files, lacking
from tools.setup_host import SetupError

ALIKE = {"JSON"}  # what is written alike in every language
UPDATE = "run `python -m tools.make_locales`"


def read(language: str, name: str) -> str:
    return (LOCALES / language / name).read_text(encoding="utf-8")


def paths(content: dict, prefix: tuple = ()) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for key, value in content.items():
        found |= paths(value, (*prefix, key)) if isinstance(value, dict) else {(*prefix, key)}
    return found


def facts(text: str) -> set[str]:
    """What a translation has to repeat: numbers, words with an underscore, digit or capitals, file endings, what is in brackets."""
    words = {word for word in re.findall(r"[A-Za-z0-9_]+", text) if re.search(r"[0-9_]|(?<=\w)[A-Z]", word)}
    words = {re.sub(r"(?<=[A-Z0-9])s$", "", word) for word in words}
    marks = re.findall(r"\{[^}]*\}|\[[^]]*\]|<[^>]*>|`[^`]*`|(?<![\w.])\.[a-z]\w+|\d+(?:\.\d+)?|-\d+|//", text)
    return words | set(marks)


def test_the_english_files_are_what_the_nodes_say(client):
    made = english_files(client.server.request("/object_info"))
    assert set(made) == set(FILES)
    for name, content in made.items():
        assert read("en", name) == as_text(content), UPDATE


def test_a_host_without_the_pack_makes_no_files():
    log = "\nCannot import /base/custom_nodes/ComfyUI-AdaState module for custom nodes: No module named 'av'\n"
    refused = "lists none of the pack's nodes, so nothing is written; see that it imports the pack"
    for told, why in (("", r"\."), (log, r" \(No module named 'av'\)\.")):
        with pytest.raises(SetupError, match=refused + why):
            english_files({"KSampler": {"category": "sampling"}}, told)


def test_the_host_serves_every_language(client):
    served = client.server.request("/i18n")
    for language in ("en", *LANGUAGES):
        own = {name: entry for name, entry in served[language]["nodeDefs"].items() if name.startswith("AdaState")}
        assert own == json.loads(read(language, "nodeDefs.json"))
        for name, key in (("main.json", "nodeCategories"), ("commands.json", "commands")):
            content = json.loads(read(language, name))
            wanted = content.get(key, content)
            assert wanted.items() <= served[language][key].items()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_text_and_each_was_made_from_today_s_english(language):
    assert lacking()[language] == [], "see `python -m tools.make_locales --lacking` and CONTRIBUTING.md"
    catalogue = Catalogue.read(language)
    first_line = (PAGE / f"texts_{language}.js").read_text(encoding="utf-8").partition("\n")[0]
    assert ("Unreviewed" in first_line) == bool(catalogue.page_unreviewed)
    for name, content in catalogue.files(english()).items():
        assert read(language, name) == as_text(content), "run `python -m tools.make_locales --languages`"
        review = set() if catalogue.is_reviewed or name != "main.json" else {("adastate", "review")}
        assert paths(content) - review == paths(english()[name])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_translation_says_what_the_english_says(language):
    catalogue = Catalogue.read(language)
    assert not catalogue.unreviewed.keys() & catalogue.reviewed.keys()
    for text, own in catalogue.texts.items():
        assert own != text or text in ALIKE, text
        assert own == own.strip() != ""
        if " " in text:  # one word alone is the name of an input or output
            assert [fact for fact in facts(text) if fact not in own] == [], (text, own)
        assert plain(escaped(own)) == own


def test_facts_are_found():
    text = "At 0.5 of {cut} [5s: x], -1: LoRAs, taew2_1, .mov, AdaState's <video>.state and Wan. GPU // 832x480"
    wanted = {"0.5", "{cut}", "[5s: x]", "-1", "LoRA", "taew2_1", ".mov", "AdaState", "<video>", "GPU", "//", "832x480"}
    assert wanted <= facts(text)
    assert not {"At", "Wan", "and", "x"} & facts(text)


def test_what_changed_in_english_is_told_and_left_in_english():
    catalogue = Catalogue("zh", {"Seed of the rollouts.": "种子。"}, {"Width.": "宽度。"}, {"stop": '"Stop"'}, {})
    contents = {
        "nodeDefs.json": {
            "A": {"inputs": {"seed": {"tooltip": "Seed of both rollouts."}, "width": {"tooltip": "Width."}}}
        }
    }
    told = catalogue.lacking(contents, {"stop": '"Halt"', "go": '"Go"'}, {"stop": '"停"', "old": '"旧"'})
    assert told == [
        'lacks "Seed of both rollouts.": "种子。"',
        'translates what no node says: "Seed of the rollouts."',
        "web/js/texts_zh.js lacks go",
        "web/js/texts_zh.js has old, which the English has not",
        'web/js/texts_zh.js: stop was made from "Stop", English is now "Halt"',
    ]
    made = catalogue.files(contents | {"main.json": {}})
    assert made["nodeDefs.json"] == {"A": {"inputs": {"width": {"tooltip": "宽度。"}}}}
    assert "unreviewed" in made["main.json"]["adastate"]["review"]
    assert catalogue.with_page(["stop"], {"stop": '"Halt"'}).page == {"stop": '"Halt"'}


def test_the_page_s_texts_are_read_from_their_code():
    texts = page_of()
    assert texts["stop"] == '"Stop and keep"' and texts["prompt"].startswith("(index, text) => (text ?")
    assert texts["meters"].startswith('{ colour: ["Colour",') and texts["redoHint"].endswith('kept" : "")')


def test_characters_of_the_message_format_are_escaped():
    assert escaped("a[5s] | b {x} @c 5%") == "a[5s] {'|'} b {'{'}x{'}'} {'@'}c 5{'%'}"
