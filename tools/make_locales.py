"""Write locales/: every text of the nodes by node and input, in English from the nodes, in other languages from tools/catalogues/.

    python -m tools.make_locales                         English from a host with the pack, then every other language
    python -m tools.make_locales --languages             the other languages alone; needs no host
    python -m tools.make_locales --lacking               what each language lacks, and what changed since it was translated
    python -m tools.make_locales --translated zh KEY ... these texts of web/js/texts_zh.js were made from today's English

The English stands in nodes/. The host's front end reads the folder of the language it is set to and shows the nodes' own texts
where one is missing. A test fails when a file is out of date. The page's own texts are in web/js/texts.js and texts_<language>.js.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.catalogue import LANGUAGES, LOCALES, Catalogue, as_text, english, escaped, page_of
from tools.host_client import PACK_NAME, Server
from tools.setup_host import ROOT, SetupError, ensure_ready, say

# categories that the front end has words for: naming them here would change other packs' too
HOSTS_CATEGORIES = {"sampling", "video"}
COMMANDS = {"Workspace_ToggleBottomPanelTab_adastate": {"label": "Toggle AdaState Bottom Panel"}}


def texts_of(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of one node from its entry in /object_info."""
    entry: dict[str, Any] = {"display_name": escaped(info["display_name"]), "description": escaped(info["description"])}
    inputs = {
        name: {"name": escaped(name)} | ({"tooltip": escaped(tooltip)} if (tooltip := options.get("tooltip")) else {})
        for group in ("required", "optional")
        for name, (_, options) in info["input"].get(group, {}).items()
    }
    tooltips = info.get("output_tooltips") or [None] * len(info["output_name"])
    outputs = {
        str(i): {"name": escaped(name)} | ({"tooltip": escaped(tooltip)} if tooltip else {})
        for i, (name, tooltip) in enumerate(zip(info["output_name"], tooltips, strict=True))
    }
    return entry | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def english_files(object_info: dict[str, Any], log: str = "") -> dict[str, dict[str, Any]]:
    """The English files by name, of what the host knows of this pack's nodes; `log` is what the host said.

    SetupError where it knows none, as after a failed import: the files would be empty.
    """
    own = {name: info for name, info in sorted(object_info.items()) if name.startswith("AdaState")}
    if not own:
        told = re.search(rf"Cannot import .*{PACK_NAME}.*?: (.+)", log)
        why = f" ({told[1].strip()})" if told else ""
        raise SetupError(
            f"ComfyUI lists none of the pack's nodes, so nothing is written; see that it imports the pack{why}.", 1
        )
    parts = {part for info in own.values() for part in info["category"].split("/")[1:]} - HOSTS_CATEGORIES
    return {
        "nodeDefs.json": {name: texts_of(info) for name, info in own.items()},
        "main.json": {"nodeCategories": {part: part for part in sorted(parts)}},
        "commands.json": COMMANDS,
    }


def write(language: str, files: dict[str, dict[str, Any]]) -> None:
    folder = LOCALES / language
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(as_text(content), encoding="utf-8")
    say(f"{folder.relative_to(ROOT)}: {len(files['nodeDefs.json'])} nodes")


def write_languages() -> None:
    for language in LANGUAGES:
        write(language, Catalogue.read(language).files(english()))


def lacking() -> dict[str, list[str]]:
    """What each language lacks, a line each."""
    contents, today = english(), page_of()
    return {name: Catalogue.read(name).lacking(contents, today, page_of(name)) for name in LANGUAGES}


def tell_lacking() -> int:
    found = lacking()
    for name, lines in found.items():
        catalogue = Catalogue.read(name)
        unseen = len(catalogue.unreviewed) + len(catalogue.page_unreviewed)
        say(f"{name}: {len(lines)} to do, {unseen} of {len(catalogue.texts) + len(catalogue.page)} unreviewed")
        for line in lines:
            say(f"  {line}")
    return int(any(found.values()))


def write_english() -> None:
    """Write the English files from a host with the pack; SetupError says why not."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with Server(ensure_ready(), base / "base", base / "output", base / "server.log") as server:
            server.wait_ready()
            log = server.log.read_text(encoding="utf-8", errors="replace")
            write("en", english_files(server.request("/object_info"), log))


def main(arguments: list[str]) -> int:
    match arguments:
        case []:
            try:
                write_english()
            except SetupError as error:
                say(str(error))
                return error.code
            write_languages()
        case ["--languages"]:
            write_languages()
        case ["--lacking"]:
            return tell_lacking()
        case ["--translated", language, *keys] if language in LANGUAGES and set(keys) <= set(page_of()):
            Catalogue.read(language).with_page(keys, page_of()).write()
            write_languages()
        case _:
            say(__doc__.partition("\n\n")[2])
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
