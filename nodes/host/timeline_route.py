"""Prompt timelines for pages that edit them: read and written by the grammar of the nodes, so that there is only one.

POST /adastate/timeline   {"text"}      -> {"text", "entries", "grammar"}
POST /adastate/timeline   {"entries"}   -> the same, with the entries written as "grammar", or as the first that can

Entries are {"seconds", "text", "transition", "line", "column"}; a transition is null where the prompt names none. Further keys
of the body: "fps" (prompts must fall on different latent frames), "duration" (seconds, as on Prompt Timeline) and "words": true
(the words of the demo model). What is no timeline is answered with {"error": {"message", "line", "column"}}, and 200, since
asking is how a page finds out; line and column count from 1 and are null where the fault is in no place of a text. A body
that asks nothing is refused with 400.
"""

from __future__ import annotations

import json
import math
from typing import Any

from aiohttp import web

from ...adastate_core.demo_words import words_over_time
from ...adastate_core.timeline import TimedText, TimelineError, grammar_of, parse_timeline
from ...adastate_core.timeline_format import GRAMMARS, format_timeline

LONGEST_TEXT = 1_000_000
BODY = 'the body must be JSON with "text", a string, or "entries", a list of {"seconds", "text", "transition"}'


async def timeline(request: web.Request) -> web.Response:
    """The route."""
    try:
        asked = await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        asked = None
    if not isinstance(asked, dict) or not (
        isinstance(asked.get("text"), str) or isinstance(asked.get("entries"), list)
    ):
        return web.json_response({"error": {"message": BODY, "line": None, "column": None}}, status=400)
    try:
        return web.json_response(answer(asked))
    except ValueError as error:
        line, column = (error.line, error.column) if isinstance(error, TimelineError) else (None, None)
        return web.json_response({"error": {"message": str(error), "line": line, "column": column}})


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What the route says to a body; ValueError (TimelineError with a place) for one that it cannot answer."""
    fps, duration = _number(asked, "fps"), _number(asked, "duration")
    words = bool(asked.get("words"))
    if "entries" in asked:
        return _written(_entries(asked["entries"]), asked.get("grammar"), words, fps, duration)
    if len(asked["text"]) > LONGEST_TEXT:
        raise ValueError(f"the text has {len(asked['text'])} characters; at most {LONGEST_TEXT} are read")
    return _read(asked["text"], words, fps, duration)


def _number(asked: dict[str, Any], name: str) -> float | None:
    """A positive number of the body, None where it is left out or 0."""
    value = asked.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def _read(text: str, words: bool, fps: float | None, duration: float | None) -> dict[str, Any]:
    entries = parse_timeline(text, duration=duration)
    if words:
        words_over_time(text)
    if fps:
        _check_frames(entries, fps)
    keys = ("seconds", "text", "transition", "line", "column")
    told = [{key: getattr(entry, key) for key in keys} for entry in entries]
    return {"text": text, "entries": told, "grammar": grammar_of(text)}


def _check_frames(entries: tuple[TimedText, ...], fps: float) -> None:
    """TimelineError where two prompts fall on one latent frame, as the rollout would find."""
    for before, entry in zip(entries, entries[1:], strict=False):
        if round(entry.seconds * fps / 4) == round(before.seconds * fps / 4):
            least = 4 / fps
            raise TimelineError(
                f"this prompt is at {entry.seconds:g}s, less than a latent frame ({least:g}s) behind the one before; move it",
                entry.line,
                entry.column,
            )


def _entries(given: list[Any]) -> list[TimedText]:
    """The entries of a body, in order of time."""
    read = []
    for number, entry in enumerate(given, 1):
        seconds, text = (entry.get("seconds"), entry.get("text")) if isinstance(entry, dict) else (None, None)
        transition = entry.get("transition") or None if isinstance(entry, dict) else None
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            raise ValueError(f"prompt {number} begins at {seconds!r}; give a number of seconds")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompt {number} is empty; write what the video shows from {seconds:g}s on")
        if len(text) > LONGEST_TEXT or not (transition is None or isinstance(transition, str)):
            raise ValueError(BODY)
        lines = (line.strip() for line in text.split("\n"))
        read.append(TimedText(float(seconds), "\n".join(line for line in lines if line), transition))
    return sorted(read, key=lambda entry: entry.seconds)


def _written(
    entries: list[TimedText], grammar: Any, words: bool, fps: float | None, duration: float | None
) -> dict[str, Any]:
    """A single prompt without a transition may go without a mark, where the text had none."""
    if grammar is None and len(entries) == 1 and entries[0].transition is None and entries[0].seconds == 0:
        plain = entries[0].text
        if grammar_of(plain) is None:
            return _read(plain, words, fps, duration)
    first = grammar if grammar in GRAMMARS else "lines"
    fault: ValueError | None = None
    for each in (first, *(other for other in ("lines", "marks", "bars") if other != first)):
        try:
            text = format_timeline(entries, each)
        except ValueError as error:
            fault = fault or error
        else:
            return _read(text, words, fps, duration)
    raise fault
