"""Write locales/en/nodeDefs.json: every text of the nodes by node and input, for translators to copy into locales/<language>/.

    python -m tools.make_locales

The texts themselves stand in nodes/, this file is made of them; the host's front end reads the folder of the language it is set to
and shows the nodes' own texts where one is missing. A test fails when the file is out of date. What the page adds (web/js/texts.js)
is not among them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.host_client import Server
from tools.setup_host import ROOT, ensure_ready, say

FILE = ROOT / "locales" / "en" / "nodeDefs.json"
# characters that mean something in the front end's message format
_SPECIAL = re.compile(r"[{}@|$%]")


def escaped(text: str) -> str:
    """A text as the front end's message format writes it."""
    return _SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def texts_of(info: dict[str, Any]) -> dict[str, Any]:
    """The texts of one node from its entry in /object_info."""
    entry: dict[str, Any] = {"display_name": escaped(info["display_name"]), "description": escaped(info["description"])}
    inputs = {
        name: {"tooltip": escaped(options["tooltip"])}
        for group in ("required", "optional")
        for name, (_, options) in info["input"].get(group, {}).items()
        if options.get("tooltip")
    }
    outputs = {
        str(i): {"tooltip": escaped(tooltip)} for i, tooltip in enumerate(info.get("output_tooltips") or []) if tooltip
    }
    return entry | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def node_texts(object_info: dict[str, Any]) -> dict[str, Any]:
    """The texts of every node of this pack, by node id."""
    return {name: texts_of(info) for name, info in sorted(object_info.items()) if name.startswith("AdaState")}


def as_text(texts: dict[str, Any]) -> str:
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        with Server(ensure_ready(), base / "base", base / "output", base / "server.log") as server:
            server.wait_ready()
            texts = node_texts(server.request("/object_info"))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(as_text(texts), encoding="utf-8")
    say(f"{FILE.relative_to(ROOT)}: {len(texts)} nodes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
