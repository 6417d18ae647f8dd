"""Prompt timelines for pages that edit them: read and written by the grammar of the nodes, so that there is only one.

POST /adastate/timeline   {"text"}      -> {"text", "entries", "grammar"}
POST /adastate/timeline   {"entries"}   -> the same, with the entries written as "grammar", or as the first that can

Entries are {"seconds", "text", "transition", "seed", "strength", "line", "column"}; a transition is null where the prompt names
none, and the noise's seed and the adaptive anchor's strength where they stay; one that sets a number, or is a "shot", may have an
empty text. Further keys of the body: "fps" (prompts must fall on different latent frames), "duration" (seconds, as on
Prompt Timeline) and "words": true (the words of the demo model). What is no timeline is answered with {"error": {"message",
"line", "column"}}, and 200, since asking is how a page finds out; line and column count from 1 and are null where the fault is in
no place of a text. A body that asks nothing is refused with 400, one that is longer than any timeline with 413. The work is done
off the event loop.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from ...adastate_core.prompts.demo_words import words_over_time
from ...adastate_core.prompts.entry_options import MOST_SEED, SHOT
from ...adastate_core.prompts.timeline import (
    LONGEST,
    LONGEST_TEXT,
    MOST_PROMPTS,
    TimedText,
    TimelineError,
    grammar_of,
    parse_timeline,
)
from ...adastate_core.prompts.timeline_format import GRAMMARS, format_timeline
from .node import shown
from .request_body import BodyError, off_loop, parse_json, read_bytes

MOST_FPS = 1000
BODY = 'the body must be JSON with "text", a string, or "entries", a list of {"seconds", "text", "transition"}'


async def timeline(request: web.Request) -> web.Response:
    """The route."""
    try:
        status, text = await off_loop(_answered, await read_bytes(request))
    except BodyError as error:
        status, text = error.status, _fault(str(error))
    return web.Response(text=text, status=status, content_type="application/json")


def _answered(body: bytes) -> tuple[int, str]:
    """HTTP status and JSON of the answer to a body."""
    try:
        asked = parse_json(body, BODY)
        if not isinstance(asked, dict) or not _asks(asked):
            return 400, _fault(BODY)
        return 200, json.dumps(answer(asked))
    except BodyError as error:
        return error.status, _fault(str(error))
    except ValueError as error:
        line, column = (error.line, error.column) if isinstance(error, TimelineError) else (None, None)
        return 200, _fault(str(error), line, column)


def _asks(asked: dict[str, Any]) -> bool:
    return isinstance(asked["entries"], list) if "entries" in asked else isinstance(asked.get("text"), str)


def _fault(message: str, line: int | None = None, column: int | None = None) -> str:
    return json.dumps({"error": {"message": message, "line": line, "column": column}})


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What the route says to a body; ValueError (TimelineError with a place) for one that it cannot answer."""
    fps, duration = _number(asked, "fps", MOST_FPS), _number(asked, "duration", LONGEST)
    words = bool(asked.get("words"))
    if "entries" in asked:
        return _written(_entries(asked["entries"]), asked.get("grammar"), words, fps, duration)
    return _read(asked["text"], words, fps, duration)


def _number(asked: dict[str, Any], name: str, most: int) -> float | None:
    """A positive number of the body, at most `most`; None where it is left out or 0."""
    value = asked.get(name)
    if value is None or value == 0:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise ValueError(f"{name} is {shown(value)}; it must be a positive number, at most {most}")
    return float(value)


def _read(text: str, words: bool, fps: float | None, duration: float | None) -> dict[str, Any]:
    entries = parse_timeline(text, duration=duration)
    if words:
        words_over_time(text)
    if fps:
        _check_frames(entries, fps)
    keys = ("seconds", "text", "transition", "seed", "strength", "line", "column")
    told = [{key: getattr(entry, key) for key in keys} for entry in entries]
    return {"text": text, "entries": told, "grammar": grammar_of(text)}


def check_seed(value: Any, whose: str) -> int:
    """A seed from JSON. ValueError, naming `whose` it is, for what is none."""
    if type(value) is not int or not 0 <= value <= MOST_SEED:
        raise ValueError(f"{whose} is {shown(value)}; give a whole number between 0 and {MOST_SEED}")
    return value


def check_strength(value: Any, whose: str) -> float:
    """The adaptive anchor's strength from JSON. ValueError, naming `whose` it is, for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{whose} is {shown(value)}; give a number above 0 and at most 1")
    return float(value)


def plain_lines(text: str) -> str:
    """A prompt's text as a timeline holds it: lines without spaces at their ends, blank ones left out."""
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return "\n".join(line for line in lines if line)


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
    if len(given) > MOST_PROMPTS:
        raise ValueError(f"there are {len(given)} entries; a timeline holds at most {MOST_PROMPTS}")
    read = []
    for number, entry in enumerate(given, 1):
        seconds, text = (entry.get("seconds"), entry.get("text")) if isinstance(entry, dict) else (None, None)
        transition = entry.get("transition") or None if isinstance(entry, dict) else None
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= LONGEST:
            raise ValueError(
                f"prompt {number} begins at {shown(seconds)}; give a number of seconds between 0 and {LONGEST}"
            )
        seed, strength = entry.get("seed"), entry.get("strength")
        seed = None if seed is None else check_seed(seed, f"the seed of entry {number}")
        strength = None if strength is None else check_strength(strength, f"the strength of entry {number}")
        alone = transition == SHOT or seed is not None or strength is not None
        if not isinstance(text, str) or not (text.strip() or alone):
            raise ValueError(f"prompt {number} is empty; write what the video shows from {seconds:g}s on")
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"prompt {number} has {len(text)} characters; it may have {LONGEST_TEXT}: shorten it")
        if not (transition is None or isinstance(transition, str)):
            raise ValueError(f"prompt {number} has {shown(transition)} as its transition; give its name, or null")
        timed = TimedText(float(seconds), plain_lines(text), transition, seed=seed, strength=strength)
        read.append(timed)
    return sorted(read, key=lambda entry: entry.seconds)


def _written(
    entries: list[TimedText], grammar: Any, words: bool, fps: float | None, duration: float | None
) -> dict[str, Any]:
    """A single prompt without a transition may go without a mark, where the text had none."""
    if grammar is None and len(entries) == 1 and not entries[0].options.written() and entries[0].seconds == 0:
        plain = entries[0].text
        if _stays_one(plain):
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


def _stays_one(text: str) -> bool:
    """Whether a text without a mark is read as the one prompt that it is."""
    try:
        return grammar_of(text) is None and len(parse_timeline(text)) == 1
    except TimelineError:
        return False
