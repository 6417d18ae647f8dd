"""What people write as a time and no grammar of timeline.py knows: found, so that it never becomes part of a prompt in silence.

Frames, minutes, other digits and signs, subtitles, schedules of other nodes, line breaks that are none. A number alone proves
nothing ("2 cats", "1960s diner", "9:16 portrait"): it takes what only a time has, or several lines that rise from 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

_LOOKED_AT = 200  # characters of a line's beginning
# a byte order mark read as another code among them
UNSEEN = "\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\u00ad\u180e\x00"
_DASH = "-\u2010-\u2015\u2212~\uff5e\u301c"
_COLON = ":\uff1a\u2236\ufe55\ua789"
_BREAK = r"(?:[\u2028\u2029\x85\x0b\x0c]|\\r|\\n|<br ?/?>)"
_CLOCK = rf"\d{{1,9}}(?:[{_COLON}]\d\d){{1,3}}(?!\d)"
_TIMEISH = rf"(?:{_CLOCK}|\d{{1,9}}(?:\.\d{{1,9}})?s(?!\w))"
_SECONDS = r"(?:s|secs?|seconds?|sekunden?|segundos?|secondes?)(?!\w)|\u79d2|\ucd08|\u0441\u0435\u043a\w{0,4}\.?"
_LABEL = (
    r"(?:(?:scene|shot|part|clip|segment|section|prompt|act|beat|step|chapter|keyframe|key|time|timestamp|start|begin|"
    r"second|sec)\s{0,3}\d{0,4}(?!\d)[^\w\n]{0,4})?"
)
# bullets, brackets and quotes; the number of an item; what it is called
_FRONT = rf"[^\w\n]{{0,16}}(?:\d{{1,3}}[.)][^\S\n]{{1,4}})?[^\w\n]{{0,4}}{_LABEL}"
_ENDS = rf"\s{{0,2}}[{_DASH}{_COLON}|>=,;)\]}}\uff09\u3011]"

_DECADE = r"(?:1\d|20)?[1-9]0s(?!\w)"
# what a line may begin with that looks like a clock and is a ratio, a scale or a time of day
_NO_CLOCK = re.compile(
    r"(?:9:16|16:10|10:16|9:19(?:\.5)?|9:20|9:21|2:35:1|2:39:1|2:40:1)(?!\w)|\d{1,2}:\d\d(?::\d\d)?[,\s]{0,2}(?:[ap]\.?\s?m\b|noon|"
    r"midnight|o'clock|uhr\b|in the |hours?\b|hrs?\b)|\d{1,3}:\d\d,?\s{1,2}(?:scale|aspect|ratio|format|miniature|"
    r"diecast|replica|model\b)",
    re.I,
)
_NO_SPAN = re.compile(rf"(?:1\d|20)\d0s?\s?[{_DASH}]\s?(?:(?:1\d|20)\d0|\d0)s(?!\w)")
_PLAIN_START = re.compile(rf"\s*(?:(?:1\d|20)\d0s(?!\w)|{_NO_CLOCK.pattern}|{_NO_SPAN.pattern})", re.I)

_STRONG = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        rf"{_FRONT}(?P<time>{_CLOCK})",
        rf"{_FRONT}(?!{_DECADE})(?P<time>\d{{1,9}}(?:[.,]\d{{1,9}})?\s{{0,2}}(?:{_SECONDS})){_ENDS}",
        rf"{_FRONT}(?P<time>0{{1,2}}(?:[{_COLON}]\d(?!\d)|;\d\d(?!\d))|\d{{1,3}},\d{{1,2}}s(?!\w))",
        rf"{_FRONT}(?P<time>\d{{1,9}}\s{{0,2}}(?:\u79d2|\ucd08|\u0441\u0435\u043a))",
        rf"{_FRONT}(?P<time>\d{{1,9}}(?:\.\d{{1,9}})?\s{{0,2}}(?:m|ms|mins?|minutes?|frames?|f|h|hours?))"
        rf"\s{{0,2}}(?:[{_COLON}=>]|[{_DASH}]\s)",
        rf"{_FRONT}(?P<time>\d{{1,3}}(?:m\s?\d{{1,2}}s|h\s?\d{{1,2}}m))(?![A-Za-z])",
        rf"{_FRONT}(?P<time>(?:t\s?[=+]|time\s?[={_COLON}]|seconds?\s?[={_COLON}])\s?\d)",
        r"[^\w\n]{0,16}(?P<time>@\s?\d{1,9}(?:\.\d{1,9})?(?:s(?!\w)|:\d\d))",
        rf"{_FRONT}(?P<time>(?:frames?|keyframe|kf|sec|seconds?)\s?#?\d{{1,9}})\s?[^\w\s]",
        rf"[^\w\n]{{0,16}}(?P<time>#\d{{1,9}})\s?[{_COLON}=]",
        r"[^\w\n]{0,16}(?P<time>[\"'\u201c]\d{1,9}(?:\.\d{1,9})?s?[\"'\u201d])\s?:",
        r"[\[({\s]{1,16}(?P<time>\d{1,9}(?:\.\d{1,9})?)\s?,\s?[\"'\u201c]",
        rf"{_FRONT}(?P<time>0{{1,9}}(?:\.0{{1,9}})?\s?(?:[{_DASH}]\s?\d{{1,9}}\s?)?[{_COLON}])\s",
        rf"[^\w\n]{{0,16}}(?P<time>(?:at|from|after)\s(?:0{{1,2}}:\d\d|\d{{1,9}}:\d\d(?=\s?(?:[{_DASH}{_COLON}]|to\s))|"
        rf"\d{{1,9}}(?:\.\d{{1,9}})?\s?(?:{_SECONDS})(?=\s?(?:[{_DASH}{_COLON},]|to\s))))",
        rf"[^\w\n]{{0,16}}(?P<time>(?:first|next|last|then)\s\d{{1,9}}\s?(?:{_SECONDS}))\s?[{_COLON}]",
        rf"\s{{0,16}}(?P<time>\d[\d{_COLON}.]{{0,9}}[{UNSEEN}]{{1,9}}[\d{_COLON}.])",
    )
)
# of which one line alone may be a prompt
_WEAK = re.compile(
    rf"{_FRONT}(?P<time>\d{{1,9}}(?:\.\d{{1,9}})?\s{{0,2}}(?:{_SECONDS}|frames?\b|mins?\b|minutes?\b)|#\d{{1,9}}\b)",
    re.I,
)
_NUMBER = re.compile(rf"{_FRONT}[#f@]?(?P<time>\d{{1,9}}(?:\.\d{{1,9}})?)(?=[\s,;:|=\-]|s\b)", re.I)

# anywhere in a text
_INSIDE = re.compile(
    rf"{_BREAK}[^\w\n]{{0,8}}(?P<a>{_TIMEISH})"
    rf"|[;,|][^\S\n]{{0,8}}(?P<b>0{{1,2}}:[0-5]\d(?!\d))"
    rf"|;[^\S\n]{{0,8}}(?!{_DECADE})(?P<c>\d{{1,9}}s)(?=[\s:])"
    rf"|(?<![\w:.\[])(?P<d>0{{1,2}}(?::00){{1,2}}[^\S\n]{{0,4}}(?:[{_DASH}]{{1,2}}>?|to|\u2192)[^\S\n]{{0,4}}\d{{1,9}}:\d\d)"
    rf"|(?<![\w:.\[])(?P<e>0s?[^\S\n]{{0,3}}(?:[{_DASH}]|to)[^\S\n]{{0,3}}\d{{1,9}}(?:\.\d{{1,9}})?[^\S\n]?(?:{_SECONDS}))",
    re.I,
)
_LATER = re.compile(r"(?<=\s)(?P<time>0{1,2}:[0-5]\d)(?=\s|:\s)")
_UNSEEN_AHEAD = re.compile(rf"^(?:\u00ef\u00bb\u00bf|[^\S\n]|[{UNSEEN}])+(?=[-+]?\d)", re.M)


def without_unseen(text: str) -> str:
    """The text with spaces for what nobody sees in front of a line that begins with a digit; offsets stay."""
    return _UNSEEN_AHEAD.sub(lambda front: re.sub(r"\S", " ", front[0]), text)


def is_plain(text: str, lines: Iterator[re.Match[str]]) -> bool:
    """Whether the text begins with a decade, a ratio or a time of day, and nothing else in it reads as a line's time."""
    start = _PLAIN_START.match(text)
    return start is not None and all(line.start() < start.end() for line in lines)


def unknown_time(text: str, known: Callable[[int], bool], marked: Sequence[int]) -> tuple[int, int] | None:
    """(start, end) of the first thing in `text` that is meant as a time and that no grammar reads, or None.

    `known(at)` says whether a grammar reads a time at the line that begins at `at`; `marked` are those that begin with one.
    """
    weak: list[tuple[int, int]] = []
    numbers: list[tuple[float, int, int]] = []
    at = 0
    for line in re.split("[\n\u2028\u2029\x85\x0b\x0c]", text):
        front = line[:_LOOKED_AT]
        if front and not known(at):
            for pattern in _STRONG:
                match = pattern.match(front)
                if match and not _NO_CLOCK.match(front, match.start("time")):
                    return at + match.start("time"), at + match.end("time")
            if match := _WEAK.match(front):
                weak.append((at + match.start("time"), at + match.end("time")))
            if match := _NUMBER.match(front):
                numbers.append((float(match["time"]), at + match.start("time"), at + match.end("time")))
        at += len(line) + 1
    if len(weak) > 1:
        return weak[0]
    values = [value for value, _, _ in numbers]
    if len(values) > 1 and values[0] == 0 and values == sorted(set(values)):
        return numbers[0][1:]
    return _inside(text, known, marked)


def _inside(text: str, known: Callable[[int], bool], marked: Sequence[int]) -> tuple[int, int] | None:
    """The first time that stands within a line and begins a prompt there."""
    for match in _INSIDE.finditer(text):
        name = match.lastgroup
        start = text.rfind("\n", 0, match.start(name)) + 1
        if name in "de" and known(start):
            continue
        return match.start(name), match.end(name)
    # what would be one prompt, though it has more times, written as its own
    if len(marked) == 1 and re.compile(r"\s*\d+:").match(text, marked[0]):
        end = text.find("\n", marked[0])
        for match in _LATER.finditer(text, marked[0], len(text) if end < 0 else end):
            if text[marked[0] : match.start()].strip():
                return match.start("time"), match.end("time")
    return None
