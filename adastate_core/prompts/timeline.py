"""Prompts over time as people write them: three grammars, told apart by their marks. Needs no torch.

bars    `a meadow [5s] | a desert [10s {flush}] | snow`: how long each prompt lasts; the last may leave it open
marks   `a meadow [5s: a desert] [15s {flush}: snow]`: when each begins; text in front of the first is the prompt from 0
lines   `0:00 a meadow`, and on the next line `5s {flush} a desert`: when each begins, at the start of its line

A time is `5s`, `2.5s`, `1:02.5` (m:ss) or `1:00:00` (h:mm:ss), in seconds of video; a number alone is none. A transition in
braces behind a time names how the video changes to that prompt; in bars it may stand alone: `snow [{flush}]`. The braces may
also set the noise's seed and the adaptive anchor's strength from there on, `5s {soft, seed 7, strength 0.5} snow`
(prompts/entry_options.py); with a number and no words, `5s {seed 7}`, the words stay as they are, and so they do in a shot without
words, `5s {shot}`. `#` behind a time is
Infinity-RoPE's scene cut, `{rope cut}`: the prompt that carries it begins with the cut. A mark may say its end too,
`[0s-3s: a meadow]`, as FramePack Studio allows, and so may a line, `0:00-0:05 a meadow`, `0-5s: a meadow` or `0:00 to 0:05 a
meadow`; it has to be where the next begins. The last one's end is only read: its prompt lasts to the end of the video.
Lines that start with `//` and blank lines are left out, and so are spaces at both ends of a line. A line without a time
belongs to the prompt above it, but one that starts with a digit must start with a time. A text without marks is one prompt,
and what is meant as a time but written in another way is refused where it stands (prompts/timeline_unknown.py).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from .entry_options import SHOT, TRANSITIONS, EntryOptions, OptionError, read_options
from .timeline_unknown import is_plain, unknown_time, without_unseen

__all__ = [
    "LONGEST",
    "LONGEST_TEXT",
    "MOST_PROMPTS",
    "TRANSITIONS",
    "TimedText",
    "TimelineError",
    "check_shared",
    "grammar_of",
    "locate",
    "parse_timeline",
    "tidy",
    "with_shared",
]

LONGEST = 360_000  # seconds: 100 hours
LONGEST_TEXT = 200_000  # characters
MOST_PROMPTS = 10_000
MOST_WORDS = 2_000_000  # characters of all prompts, with what they share
_LONGEST_NUMBER = 40  # characters of a time
_HASH = "rope cut"
_NONE = EntryOptions()
_TIMES = "a time is written 5s, 2.5s, 1:02.5 or 1:00:00"
_FORMS = (
    "a line begins with 0:05, 5s or 0-5s and a space, a mark is [5s: prompt], a length is prompt [5s] | (if it is no time, put 0s "
    "in front of the text)"
)

_TIME = r"(?:[0-9]+:[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?|[0-9]+:[0-5][0-9](?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?[sS])"
# What somebody may have meant as a time: it must be followed by what can follow a time to count as one.
_NEAR = r"(?:[-+]?\.?[0-9][^\s\[\]{}#:|]*|[-+]?(?:[nN][aA][nN]|[iI][nN][fF](?:inity)?)s?)"
# Every run of spaces belongs to one quantifier: two side by side would try all ways to share it.
_CHANGE = r"\s*(?:\#\s*)?(?:\{[^{}\n]*\}\s*)?"
_BRACKET = re.compile(rf"\[\s*(?:[-+]?{_TIME}(?![\w.])|{_NEAR}(?={_CHANGE}[:\]])|(?=(?:\#|\{{[^{{}}\n]*\}})\s*\]))")
# Behind a line's first time, or number: an end in the same form.
_TO = r"[^\S\n]*(?:-{1,2}>|[-\u2010-\u2015\u2212~\u2192]|(?<=\s)(?:to|until|till)(?=\s))[^\S\n]*"
_UNTIL = rf"{_TO}(?={_TIME}(?![\w.]))"
_SPAN = re.compile(rf"[0-9]+(?:\.[0-9]+)?(?={_TO}[0-9]+(?:\.[0-9]+)?[sS](?![\w.]))")
_END = re.compile(_UNTIL)
_AND = re.compile(_TO)
_LINE = re.compile(rf"^[^\S\n]*(?:[-+]?{_TIME}(?=[\s#{{]|:\s|:?\Z|{_UNTIL})|{_SPAN.pattern})|\A\s*0(?=\s)", re.M)
_OTHER_DIGITS = re.compile(r"(?:^[^\S\n]*|\[\s*)(\d+(?:[:\uff1a]\d\d)+|\d+(?:\.\d+)?[sS\uff53\uff33](?!\w))", re.M)
_DIGIT_LINE = re.compile(r"^[^\S\n]*(?=[-+]?\.?[0-9])", re.M)
_TIME_AT = re.compile(rf"{_TIME}(?![\w.])")
_WORD = re.compile(r"[^\s\[\]{}#|]+")
_COMMENT = re.compile(r"^[^\S\n]*//[^\n]*", re.M)


class TimelineError(ValueError):
    """A text that is no timeline; `line` and `column` count from 1 and lie in the text."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column = line, column


@dataclass(frozen=True)
class TimedText:
    """A prompt from `seconds` of video on; `line` and `column` say where its words begin and are not compared.

    `seed` and `strength` hold from there on, None: as before. Without words, `text` "", the prompt stays as it was; a shot begins
    another scene under it."""

    seconds: float
    text: str
    transition: str | None = None
    line: int = field(default=1, compare=False)
    column: int = field(default=1, compare=False)
    seed: int | None = None
    strength: float | None = None

    @property
    def options(self) -> EntryOptions:
        return EntryOptions(self.transition, self.seed, self.strength)

    @property
    def begins_prompt(self) -> bool:
        """Whether words or a shot begin here, and not only a number is set."""
        return bool(self.text) or self.transition == SHOT


@dataclass
class _Prompt:
    """A prompt as read: `at` is the offset of its mark, `words` that of its text; times are exact."""

    at: int
    words: int
    text: str
    options: EntryOptions = _NONE
    start: Fraction | None = None
    end: Fraction | None = None
    length: Fraction | None = None


class _Source:
    """A text with its comments and byte order mark blanked, read from an offset on; a carriage return ends a line."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEXT:
            raise TimelineError(f"the text has {len(text)} characters; at most {LONGEST_TEXT} are read", 1, 1)
        plain = re.sub(r"\r(?!\n)", "\n", " " + text[1:] if text.startswith("\ufeff") else text)
        plain = without_unseen(plain)
        self.text = _COMMENT.sub(lambda comment: " " * len(comment[0]), plain)
        self.breaks = [at for at, character in enumerate(self.text) if character == "\n"]

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of an offset; found by halving, since every prompt asks."""
        line = bisect_left(self.breaks, at)
        return line + 1, at - (self.breaks[line - 1] if line else -1)

    def error(self, at: int, message: str) -> TimelineError:
        return TimelineError(message, *self.place(at))

    def found(self, at: int) -> str:
        """What stands at an offset, for a message."""
        if at >= len(self.text):
            return "the end of the text"
        if self.text[at] == "\n":
            return "the end of the line"
        word = _WORD.match(self.text, at)
        return repr(word[0][:24] if word else self.text[at])

    def skip(self, at: int, end: int | None = None) -> int:
        """The offset of the first character from `at` on that is no space."""
        end = len(self.text) if end is None else end
        while at < end and self.text[at].isspace():
            at += 1
        return at

    def prompt(self, at: int, start: int, end: int, options: EntryOptions = _NONE) -> _Prompt:
        """The words between two offsets as the prompt of the mark at `at`; there may be none where `options` stand alone."""
        text = tidy(self.text[start:end])
        words = self.skip(start, end)
        if not text and not options.stand_alone:
            raise self.error(at, "the prompt here is empty; write what the video shows from this time on")
        return _Prompt(at, words, text, options)

    def time(self, at: int) -> tuple[Fraction, int]:
        """The time at an offset in seconds, and where it ends."""
        match = _TIME_AT.match(self.text, at)
        if match is None or len(match[0]) > _LONGEST_NUMBER:
            found = self.found(at).replace(":'", "'")
            if self.text[at : at + 1] == "-":
                raise self.error(at, f"found the negative time {found}; times count from 0, and {_TIMES}")
            hint = "is too long for a time" if match else "is no time"
            raise self.error(at, f"{found} {hint}; {_TIMES}")
        return self.seconds(at, match[0]), match.end()

    def seconds(self, at: int, digits: str) -> Fraction:
        """What the time or number at an offset says in seconds."""
        if len(digits) > _LONGEST_NUMBER:
            raise self.error(at, f"{self.found(at)} is too long for a time; {_TIMES}")
        seconds = Fraction(0)
        for part in digits.rstrip("sS").split(":"):
            seconds = seconds * 60 + Fraction(part)
        if seconds > LONGEST:
            raise self.error(at, f"{self.found(at)} is too late; times go up to 100 hours ({LONGEST}s)")
        return seconds

    def options(self, at: int, own_line: bool) -> tuple[EntryOptions, int]:
        """The `#` or the braces at an offset, if there are any, and where they end."""
        marked = self.text.startswith("#", at)
        here = at + marked
        brace = here
        while brace < len(self.text) and self.text[brace].isspace() and not (own_line and self.text[brace] == "\n"):
            brace += 1
        if not self.text.startswith("{", brace):
            return EntryOptions(_HASH if marked else None), here
        if marked:
            raise self.error(brace, "found a transition in braces behind '#'; '#' is short for {rope cut}: keep one")
        close = re.compile(r"[{}\n]").search(self.text, brace + 1)
        if close is None or close[0] != "}":
            raise self.error(brace, "the brace is not closed; a transition is written {cut}")
        try:
            return read_options(self.text[brace + 1 : close.start()]), close.end()
        except OptionError as error:
            raise self.error(brace, str(error)) from None


def parse_timeline(text: str, shared: str = "", duration: float | None = None) -> tuple[TimedText, ...]:
    """The prompts of a text in one of the three grammars (see above), the first at second 0, times strictly rising.

    `shared` is put in front of every prompt, or around it where it holds `{}`. `duration` is how many seconds the video
    lasts, if that is known: prompts between bars that say no length then share what is left evenly, and no prompt may begin
    after the end. Raises TimelineError for a text that is no timeline or longer than LONGEST_TEXT, for more than MOST_PROMPTS
    prompts and more than MOST_WORDS characters with what is shared; ValueError for a duration that is none.
    """
    if duration is not None and not 0 < duration < math.inf:
        raise ValueError(f"duration is {duration}; it must be a positive number of seconds")
    source = _Source(text)
    if not source.text.strip():
        raise TimelineError("there is no prompt; write at least one", 1, 1)
    prompts = _read(source, None if duration is None else Fraction(duration))
    if len(prompts) > MOST_PROMPTS:
        raise source.error(
            prompts[MOST_PROMPTS].at, f"there are {len(prompts)} prompts; a timeline holds at most {MOST_PROMPTS}"
        )
    shared = tidy(shared)
    check_shared(shared, prompts)
    entries: list[TimedText] = []
    for prompt in prompts:
        seconds = float(prompt.start or 0)
        _check_start(source, prompt, seconds, entries, duration)
        options, place = prompt.options, source.place(prompt.words)
        text = with_shared(shared, prompt.text)
        entries.append(TimedText(seconds, text, options.transition, *place, options.seed, options.strength))
    return tuple(entries)


def _read(source: _Source, duration: Fraction | None) -> list[_Prompt]:
    """The prompts by the grammar that the first mark of the text belongs to."""
    if not source.text.isascii():
        for time in _OTHER_DIGITS.finditer(source.text):
            if not time[1].isascii():
                raise source.error(time.start(1), f"{time[1][:24]!r} is no time in the digits 0 to 9; {_TIMES}")
    bracket = _BRACKET.search(source.text)
    if not bracket and is_plain(source.text, _LINE.finditer(source.text)):
        return [source.prompt(source.skip(0), 0, len(source.text))]
    _refuse_unknown(source)
    if _LINE.search(source.text):
        if bracket:
            raise source.error(
                bracket.start(),
                "found a time in brackets in a text whose lines start with times; write all times the same way",
            )
        return _lines(source)
    if bracket:
        head = _Head(source, bracket.start())
        return _marks(source) if head.closing == ":" else _bars(source, duration)
    if "|" in source.text:
        return _bars(source, duration)
    return [source.prompt(source.skip(0), 0, len(source.text))]


def _refuse_unknown(source: _Source) -> None:
    """TimelineError for what somebody meant as a time and no grammar reads: it would become words of a prompt."""
    lines = [match.start() for match in _LINE.finditer(source.text)]
    known = set(lines)

    def reads(at: int) -> bool:
        if at in known:
            return True
        end = source.text.find("\n", at)  # no further: of many blank lines each would look through all behind it
        return bool(_BRACKET.match(source.text, source.skip(at, end if end >= 0 else None)))

    if found := unknown_time(source.text, reads, lines):
        written = " ".join(source.text[found[0] : found[1]].split())
        raise source.error(found[0], f"{written[:24]!r} is no time that is read here: {_FORMS}")


def grammar_of(text: str) -> str | None:
    """Which grammar the first mark of a text belongs to: "bars", "marks" or "lines"; None for a text without marks.

    Raises TimelineError for a first mark that belongs to none.
    """
    source = _Source(text)
    if _LINE.search(source.text):
        return "lines"
    if bracket := _BRACKET.search(source.text):
        return "marks" if _Head(source, bracket.start()).closing == ":" else "bars"
    return "bars" if "|" in source.text else None


class _Head:
    """What a bracket opens with: a time, perhaps an end, a transition, and then `:` (a mark) or `]` (a length)."""

    def __init__(self, source: _Source, at: int) -> None:
        self.at, self.time, self.end = at, None, None
        here = source.skip(at + 1)
        if source.text[here : here + 1] not in ("#", "{"):
            self.time, here = source.time(here)
            until = source.skip(here)
            if to := _AND.match(source.text, until):
                self.end_at = source.skip(to.end())
                self.end, here = source.time(self.end_at)
        self.options, here = source.options(here, own_line=False)
        here = source.skip(here)
        self.closing = source.text[here : here + 1]
        if self.closing not in (":", "]") or (self.time is None and self.closing == ":"):
            found = source.found(here)
            raise source.error(
                here, f"found {found} in a bracket; behind its time come ']' (how long) or ':' and the prompt (when)"
            )
        if self.end is not None and (self.closing == "]" or self.end <= self.time):
            raise source.error(
                self.end_at,
                f"found {source.found(self.end_at)} as an end; it is written [0s-3s: prompt] and comes later",
            )
        self.after = here + 1


def _marks(source: _Source) -> list[_Prompt]:
    """`[3s: prompt]`, one after the other; text in front of the first is the prompt from 0."""
    prompts: list[_Prompt] = []
    first = _BRACKET.search(source.text).start()
    if source.text[:first].strip():
        prompts.append(source.prompt(source.skip(0), 0, first))
        prompts[0].start = Fraction(0)
    here = first
    while here < len(source.text):
        if not _BRACKET.match(source.text, here):
            raise source.error(
                here,
                f"found {source.found(here)} between the marks; every prompt behind the first mark is written [5s: prompt]",
            )
        head = _Head(source, here)
        if head.closing == "]":
            raise source.error(here, "found a length among marks that say when a prompt begins; write [5s: prompt]")
        close = _closing_bracket(source, here, head.after)
        prompt = source.prompt(here, head.after, close, head.options)
        prompt.start, prompt.end = head.time, head.end
        prompts.append(prompt)
        here = source.skip(close + 1)
    _check_ends(source, prompts)
    return prompts


def _check_ends(source: _Source, prompts: Sequence[_Prompt]) -> None:
    """TimelineError where a prompt ends elsewhere than the next begins."""
    for prompt, following in zip(prompts, prompts[1:], strict=False):
        if prompt.end is not None and prompt.end != following.start:
            raise source.error(
                following.at,
                f"the prompt before ends at {_plain(prompt.end)} and this begins at {_plain(following.start)}; "
                "each lasts until the next: leave the end out",
            )


def _closing_bracket(source: _Source, opened: int, here: int) -> int:
    """The offset of the `]` that belongs to the mark at `opened`, whose words begin at `here`."""
    depth = 1
    for bracket in re.compile(r"[\[\]]").finditer(source.text, here):
        if bracket[0] == "[" and _BRACKET.match(source.text, bracket.start()):
            raise source.error(
                bracket.start(), "found a time in brackets inside a mark; close the mark before with ']'"
            )
        depth += 1 if bracket[0] == "[" else -1
        if depth == 0:
            return bracket.start()
    raise source.error(opened, "the bracket is not closed; a mark is written [5s: prompt]")


def _bars(source: _Source, duration: Fraction | None) -> list[_Prompt]:
    """`prompt [5s] | prompt`: the lengths add up to the starts."""
    prompts, start = [], 0
    for segment in source.text.split("|"):
        prompts.append(_segment(source, start, start + len(segment)))
        start += len(segment) + 1
    _share_the_rest(source, prompts, duration)
    begun = Fraction(0)
    for prompt in prompts:
        prompt.start = begun
        begun += prompt.length or 0
        if begun > LONGEST:
            raise source.error(prompt.at, "the lengths add up to more than 100 hours; shorten them")
    return prompts


def _segment(source: _Source, start: int, end: int) -> _Prompt:
    """The prompt between two bars, with its length if it says one."""
    at = source.skip(start, end)
    bracket = _BRACKET.search(source.text, start, end)
    if bracket is None:
        return source.prompt(at, start, end)
    head = _Head(source, bracket.start())
    if head.closing == ":":
        raise source.error(head.at, "found a mark with a start time among lengths; between bars a prompt ends in [5s]")
    rest = source.skip(head.after, end)
    if rest < end:
        more = "; subtitles behind ';' are not known here" if source.text[rest] == ";" else ""
        raise source.error(
            rest,
            f"found {source.found(rest)} behind a length; a bar or the end of the text must follow{more} (when a prompt begins is "
            "written [5s: prompt], or 5s prompt on a line of its own)",
        )
    if head.time == 0:
        raise source.error(head.at, "a prompt that lasts 0 seconds leaves two at one time; give it a length or drop it")
    prompt = source.prompt(at, start, head.at, head.options)
    prompt.length = head.time
    return prompt


def _share_the_rest(source: _Source, prompts: list[_Prompt], duration: Fraction | None) -> None:
    """Give prompts without a length an equal share of what the others leave of the video."""
    open_ended = [prompt for prompt in prompts if prompt.length is None]
    if all(prompt is prompts[-1] for prompt in open_ended):
        return
    if duration is None:
        raise source.error(
            open_ended[0].at,
            "this prompt stands before a bar and says no length; end it in [5s] (only the last may go without)",
        )
    rest = duration - sum(prompt.length for prompt in prompts if prompt.length is not None)
    if rest <= 0:
        raise source.error(
            open_ended[0].at,
            f"this prompt says no length, and the others fill all {_plain(duration)} of the video; shorten them",
        )
    for prompt in open_ended:
        prompt.length = rest / len(open_ended)


def _lines(source: _Source) -> list[_Prompt]:
    """Lines that start with a time; text in front of the first is the prompt from 0."""
    starts = [match.end() for match in _DIGIT_LINE.finditer(source.text)]
    prompts: list[_Prompt] = []
    if source.text[: starts[0]].strip():
        prompts.append(source.prompt(source.skip(0), 0, starts[0]))
        prompts[0].start = Fraction(0)
    for at, following in zip(starts, [*starts[1:], len(source.text)], strict=True):
        if span := _SPAN.match(source.text, at):
            seconds, here = source.seconds(at, span[0]), span.end()
        else:
            seconds, here = source.time(at)
        end = None
        if until := _END.match(source.text, here):
            end, here = source.time(until.end())
            if end <= seconds:
                raise source.error(until.end(), f"the prompt ends at {_plain(end)}, no later than it begins")
        options, here = source.options(here, own_line=True)
        here += source.text.startswith(":", here)
        if here < len(source.text) and not source.text[here].isspace():
            raise source.error(here, f"found {source.found(here)} right behind a time; put a space between")
        prompt = source.prompt(at, here, following, options)
        prompt.start, prompt.end = seconds, end
        prompts.append(prompt)
    _check_ends(source, prompts)
    return prompts


def _check_start(
    source: _Source, prompt: _Prompt, seconds: float, before: Sequence[TimedText], duration: float | None
) -> None:
    """The first prompt begins at 0 and has words, each other one begins later than the one before, all before the video ends."""
    if not before and not prompt.text:
        raise source.error(prompt.at, "the first prompt has no words; write what the video shows from its beginning on")
    if not before and seconds:
        raise source.error(
            prompt.at,
            f"the first prompt begins at {_plain(prompt.start)}, and nothing says what is shown before; give a prompt for "
            "0s (if this was not meant as a time, put 0s in front of it)",
        )
    if before and seconds == before[-1].seconds:
        raise source.error(prompt.at, f"there are two prompts at {_plain(prompt.start)}; keep one")
    if before and seconds < before[-1].seconds:
        raise source.error(
            prompt.at,
            f"{_plain(prompt.start)} comes after {before[-1].seconds:g}s; times must rise from prompt to prompt",
        )
    if duration is not None and seconds >= duration:
        raise source.error(
            prompt.at, f"this prompt begins at {_plain(prompt.start)}, and the video ends at {duration:g}s"
        )


def tidy(text: str) -> str:
    """Lines without spaces at their ends, blank ones left out."""
    return "\n".join(line for line in (line.strip() for line in text.split("\n")) if line)


def _plain(seconds: Fraction) -> str:
    return f"{float(seconds):g}s"


def check_shared(shared: str, prompts: Sequence[_Prompt] | Sequence[TimedText]) -> None:
    """TimelineError where the prompts with what they share are too long to be written out."""
    places = shared.count("{}")
    around = len(shared) - 2 * places if places else len(shared) + 1
    words = len(prompts) * around + max(1, places) * sum(len(prompt.text) for prompt in prompts)
    if shared and words > MOST_WORDS:
        raise TimelineError(
            f"{len(prompts)} prompts with what they share have {words} characters; they may have {MOST_WORDS} in all: "
            "shorten shared",
            1,
            1,
        )


def with_shared(shared: str, text: str) -> str:
    """A prompt's words with what all share, in front or around it; no words stay none."""
    if not text:
        return ""
    if "{}" in shared:
        return shared.replace("{}", text)
    return f"{shared} {text}" if shared else text


def locate(text: str, entry: TimedText, offset: int) -> tuple[int, int]:
    """Line and column in `text` of the character at `offset` of the text of an entry read from it (without `shared`)."""
    source = _Source(text)
    at = (source.breaks[entry.line - 2] + 1 if entry.line > 1 else 0) + entry.column - 1
    for _ in range(sum(not character.isspace() for character in entry.text[:offset])):
        at = source.skip(at) + 1
    return source.place(source.skip(at))
