"""The pack's texts in other languages: catalogues of English sentences and what they become, and what is made of them.

`tools/catalogues/<language>.json` holds, under "unreviewed" and "reviewed", a translation for each English text of
`locales/en/`, by that text itself: where the English changes, the old translation no longer fits and is told as lacking.
`page` says in the same way from which English each text of `web/js/texts_<language>.js` was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"
CATALOGUES = ROOT / "tools" / "catalogues"
PAGE = ROOT / "web" / "js"
LANGUAGES = ("zh", "ja", "ko")
FILES = ("nodeDefs.json", "main.json", "commands.json")
# characters that mean something in the front end's message format
_SPECIAL = re.compile(r"[{}@|$%]")
_QUOTED = re.compile(r"\{'(.)'\}")
_PAGE_KEY = re.compile(r"^  (\w+):\s*", re.M)


def escaped(text: str) -> str:
    """A text as the front end's message format writes it."""
    return _SPECIAL.sub(lambda found: f"{{'{found[0]}'}}", text)


def plain(text: str) -> str:
    """A text as it is read, of how the message format writes it."""
    return _QUOTED.sub(r"\1", text)


def as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def english() -> dict[str, dict[str, Any]]:
    """The English files by name."""
    return {name: json.loads((LOCALES / "en" / name).read_text(encoding="utf-8")) for name in FILES}


def leaves(content: dict[str, Any]) -> Iterator[str]:
    """Every text of a file as it is read."""
    for value in content.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield plain(value)


def page_texts(source: str) -> dict[str, str]:
    """Key -> the code of its text, of the source of web/js/texts.js or a translation: an entry begins behind two spaces."""
    body = source[re.search(r"^export const \w+ = \{\n", source, re.M).end() : source.rindex("\n};")]
    starts = [*_PAGE_KEY.finditer(body)]
    ends = [*(start.start() for start in starts[1:]), len(body)]
    return {
        start[1]: " ".join(body[start.end() : end].split()).rstrip(",") for start, end in zip(starts, ends, strict=True)
    }


def page_of(language: str | None = None) -> dict[str, str]:
    """The page's texts as code, in English or in a language."""
    name = f"texts_{language}.js" if language else "texts.js"
    return page_texts((PAGE / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Catalogue:
    """One language's translations. `texts` and `page` go by what nobody has reviewed yet and what a reader has."""

    language: str
    unreviewed: dict[str, str]
    reviewed: dict[str, str]
    page_unreviewed: dict[str, str]
    page_reviewed: dict[str, str]

    @classmethod
    def read(cls, language: str) -> Catalogue:
        saved = json.loads((CATALOGUES / f"{language}.json").read_text(encoding="utf-8"))
        page = saved["page"]
        return cls(language, saved["unreviewed"], saved["reviewed"], page["unreviewed"], page["reviewed"])

    def write(self) -> None:
        page = {"unreviewed": self.page_unreviewed, "reviewed": self.page_reviewed}
        saved = {"unreviewed": self.unreviewed, "reviewed": self.reviewed, "page": page}
        (CATALOGUES / f"{self.language}.json").write_text(as_text(saved), encoding="utf-8")

    @property
    def texts(self) -> dict[str, str]:
        return self.unreviewed | self.reviewed

    @property
    def page(self) -> dict[str, str]:
        return self.page_unreviewed | self.page_reviewed

    @property
    def is_reviewed(self) -> bool:
        return not self.unreviewed and not self.page_unreviewed

    def of(self, content: dict[str, Any]) -> dict[str, Any]:
        """A file of English texts in this language; what has no translation is left out, and the front end shows English."""
        made = {}
        for key, value in content.items():
            if isinstance(value, dict):
                if inner := self.of(value):
                    made[key] = inner
            elif text := self.texts.get(plain(value)):
                made[key] = escaped(text)
        return made

    def files(self, contents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The host's files in this language by name; main.json says so while it is unreviewed."""
        made = {name: self.of(content) for name, content in contents.items()}
        if not self.is_reviewed:
            made["main.json"]["adastate"] = {"review": "unreviewed: no reader of this language has seen all of it"}
        return made

    def with_page(self, keys: list[str], today: dict[str, str]) -> Catalogue:
        """Write down that these texts of the page were translated from today's English; a reader has to see them again."""
        changed = self.page_unreviewed | {key: today[key] for key in keys}
        kept = {key: text for key, text in self.page_reviewed.items() if key not in keys}
        return Catalogue(self.language, self.unreviewed, self.reviewed, changed, kept)

    def lacking(self, contents: dict[str, dict[str, Any]], today: dict[str, str], own: dict[str, str]) -> list[str]:
        """What has to be done, a line each: texts without a translation, translations of no text, and the same of the page.

        `today` and `own` are the page's texts as code, in English and in this language.
        """
        wanted = dict.fromkeys(text for content in contents.values() for text in leaves(content))
        over = [text for text in self.texts if text not in wanted]
        told = []
        for text in wanted:
            if not self.texts.get(text):
                told.append(f"lacks {json.dumps(text, ensure_ascii=False)}: " + _like(text, over, self.texts))
        told += [f"translates what no node says: {json.dumps(text, ensure_ascii=False)}" for text in over]
        file = f"web/js/texts_{self.language}.js"
        told += [f"{file} lacks {key}" for key in today if key not in own]
        told += [f"{file} has {key}, which the English has not" for key in own if key not in today]
        for key in today:
            if key in own and (was := self.page.get(key)) != today[key]:
                told.append(f"{file}: {key} was made from {was}, English is now {today[key]}")
        return told + [f"page: {key} is no text any more" for key in self.page if key not in today]


def _like(text: str, over: list[str], texts: dict[str, str]) -> str:
    """The translation that a changed text had, if one is near enough to be it."""
    near = get_close_matches(text, over, 1, 0.6)
    return json.dumps(texts[near[0]] if near else "", ensure_ascii=False)
