"""Prompts over time: the three grammars, errors with their place, writing back, the value, and blends of embeddings."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sampled
import torch

from adastate_core.prompts.demo_words import DEFAULTS, words_over_time
from adastate_core.prompts.timeline import LONGEST_TEXT, MOST_PROMPTS, MOST_WORDS, _Source, grammar_of
from adastate_core.prompts.values import (
    GRAMMARS,
    TRANSITIONS,
    PromptAt,
    Prompts,
    TimedText,
    TimelineError,
    blended,
    format_timeline,
    listing,
    locate,
    parse_timeline,
)

ROOT = Path(__file__).resolve().parents[2]


def read(text: str, *args, **kwargs) -> list[tuple]:
    return [(e.seconds, e.text, e.transition) for e in parse_timeline(text, *args, **kwargs)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a meadow", [(0, "a meadow", None)]),
        ("a meadow,\n  90 sheep\n\n// nobody\n[2 dogs], 16:9", [(0, "a meadow,\n90 sheep\n[2 dogs], 16:9", None)]),
        ("A[5s] | B b [10s#] | C", [(0, "A", None), (5, "B b", "rope cut"), (15, "C", None)]),
        ("A [0:05]|\nB [1.5S {Flush}]|C [{rope-cut}]", [(0, "A", None), (5, "B", "flush"), (6.5, "C", "rope cut")]),
        ("A [10s#]", [(0, "A", "rope cut")]),
        ("a [b] c [5s] | (d:1.2)", [(0, "a [b] c", None), (5, "(d:1.2)", None)]),
        ("A [3s: B] [1:02.5 {cut}: C [c] | c]", [(0, "A", None), (3, "B", None), (62.5, "C [c] | c", "cut")]),
        ("[0s: A]\n// why\n[1:00:00: B\nb]", [(0, "A", None), (3600, "B\nb", None)]),
        ("[0s-3s: A][3s – 5s#: B]", [(0, "A", None), (3, "B", "rope cut")]),
        ("0:00 A\n\n5s {soft} B\n  more\n// C\n1:02.5: D | [d]", [(0, "A", None), (5, "B\nmore", "soft"), (62.5, "D | [d]", None)]),
        ("A\r\n5s# B\r\n", [(0, "A", None), (5, "B", "rope cut")]),
        ("0s {cut}: 90s sitcom", [(0, "90s sitcom", "cut")]),
        ("0s A\n5s\n{cut} B", [(0, "A", None), (5, "{cut} B", None)]),
        ("0s A 5s later", [(0, "A 5s later", None)]),
    ],
)  # fmt: skip
def test_the_three_grammars(text, expected):
    assert read(text) == expected


def test_where_the_words_begin():
    places = [(e.line, e.column) for e in parse_timeline("0:00 a\n// c\n5s {cut}\n  b\n1:02: c")]
    assert places == [(1, 6), (4, 3), (5, 7)]
    text = "0s red\n// blue\n\n  blue  green\n9s x"
    assert locate(text, parse_timeline(text)[0], "red\nblue  green".index("green")) == (4, 9)


def test_a_shared_part():
    assert [t for _, t, _ in read("a[1s]|b", " A film. ")] == ["A film. a", "A film. b"]
    assert [t for _, t, _ in read("a[1s]|b", "A {} film, {cut} {}")] == ["A a film, {cut} a", "A b film, {cut} b"]


def test_a_known_duration():
    assert read("a | b [2s] | c", duration=8) == [(0, "a", None), (3, "b", None), (5, "c", None)]
    assert read("a | b | c", duration=1)[1][0] == 1 / 3
    with pytest.raises(TimelineError, match="line 2, column 1: this prompt begins at 5s, and the video ends at 5s"):
        parse_timeline("a\n5s b", duration=5)
    with pytest.raises(
        TimelineError, match="line 1, column 10: this prompt says no length, and the others fill all 5s"
    ):
        parse_timeline("a [5s] | b | c", duration=5)
    for duration in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="duration is"):
            parse_timeline("a", duration=duration)


ERRORS = [
    ("", 1, 1, "there is no prompt"),
    ("\n// a\n ", 1, 1, "there is no prompt"),
    ("a | b", 1, 1, "says no length"),
    ("a [5s] | b | c", 1, 10, "says no length"),
    ("a [5s] |", 1, 9, "is empty"),
    ("a [5s] | [3s] | c", 1, 10, "is empty"),
    ("a [5s | b", 1, 7, "found '|' in a bracket; behind its time come"),
    ("a\n[5s", 2, 4, "found the end of the text in a bracket"),
    ("a [5s] b | c", 1, 8, "found 'b' behind a length"),
    ("a [5s]; one", 1, 7, "subtitles"),
    ("a [5s] | b [0s] | c", 1, 12, "lasts 0 seconds"),
    ("a [5s] | [9s: b]", 1, 10, "found a mark with a start time among lengths"),
    ("a [60:00:00] | b [99:00:00] | c", 1, 16, "more than 100 hours"),
    ("a [5min] | b", 1, 4, "'5min' is no time; a time is written 5s, 2.5s, 1:02.5 or 1:00:00"),
    ("a [-5s] | b", 1, 4, "negative time '-5s'"),
    ("a [5s {zoom}] | b", 1, 7, "there is no transition 'zoom'; known are {cut}, {recache}, {flush}, {rope cut}, {soft}"),
    ("a [5s# {cut}] | b", 1, 8, "keep one"),
    ("a [5s {cut] | b", 1, 7, "the brace is not closed"),
    ("a [3: b]", 1, 4, "'3' is no time"),
    ("a [nans: b]", 1, 4, "'nans' is no time"),
    ("a [inf: b]", 1, 4, "'inf' is no time"),
    ("a [3s: b", 1, 3, "the bracket is not closed"),
    ("a [3s: b [6s: c]", 1, 10, "inside a mark"),
    ("a [3s: b] c [6s: d]", 1, 11, "found 'c' between the marks"),
    ("a [3s: b] [6s]", 1, 11, "found a length among marks"),
    ("a [3s: ]", 1, 3, "is empty"),
    ("a [3s: b] [3s: c]", 1, 11, "two prompts at 3s"),
    ("a [3s: b]\n [2s: c]", 2, 2, "2s comes after 3s; times must rise"),
    ("[1s: a] [2s: b]", 1, 1, "the first prompt begins at 1s"),
    ("a [3s-2s: b]", 1, 7, "comes later"),
    ("[0s-3s: a] [4s: b]", 1, 12, "the prompt before ends at 3s and this begins at 4s"),
    ("a [0s: b]", 1, 3, "two prompts at 0s"),
    ("a\n5s", 2, 1, "is empty"),
    ("0s a\n-5s b", 2, 1, "negative"),
    ("0s a\n12 b", 2, 1, "'12' is no time"),
    ("0 a\n5 b", 1, 1, "'0' is no time"),
    ("0s a\n1:75 b", 2, 1, "'1:75' is no time"),
    ("0s a\n9999999s b", 2, 1, "too late; times go up to 100 hours"),
    ("0s a\n" + "9" * 500 + "s b", 2, 1, "too long for a time"),
    ("0s a\n5s {} b", 2, 4, "there is no transition ''"),
    ("0s a\n5s#b", 2, 4, "put a space between"),
    ("90s sitcom", 1, 1, "the first prompt begins at 90s, and nothing says what is shown before"),
    ("0s a [5s] | b", 1, 6, "write all times the same way"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "column", "message"), ERRORS, ids=lambda value: repr(value)[:30])
def test_errors_say_where_and_what(text, line, column, message):
    with pytest.raises(TimelineError) as refusal:
        parse_timeline(text)
    assert (refusal.value.line, refusal.value.column) == (line, column)
    assert str(refusal.value).startswith(f"line {line}, column {column}: ") and message in str(refusal.value)


PIECES = [
    *"|[]{}#:;.-+ \n/0159sab", "5s", "[5s]", "[3s: ", "0:05", "\n0s ", "\n7s ", "{cut}", "{rope cut}", " | ", "// ", "nan", "]",
    "\r", "\t", "é", "\u2028", "a red hat",
]  # fmt: skip


def broken(text: str) -> str:
    """A text whose lines all end as those of the reader do."""
    return re.sub(r"\r(?!\n)", "\n", text)


def test_no_text_crashes_it():
    """Random texts of the grammar's characters parse to a timeline, or fail at a place that is in the text."""
    chance = random.Random(7)
    parsed = refused = 0
    for _ in range(6000):
        text = "".join(chance.choice(PIECES) for _ in range(chance.randrange(14)))
        duration = chance.choice([None, None, 6.5])
        try:
            entries = parse_timeline(text, duration=duration)
        except TimelineError as error:
            lines = broken(text).split("\n")
            assert 1 <= error.line <= len(lines) and 1 <= error.column <= len(lines[error.line - 1]) + 1, text
            refused += 1
            continue
        parsed += 1
        with pytest.raises(TimelineError) as unknown:
            words_over_time(text)
        assert 1 <= unknown.value.line <= broken(text).count("\n") + 1, text
        assert entries[0].seconds == 0 and all(e.text.strip() for e in entries), text
        assert all(a.seconds < b.seconds for a, b in zip(entries, entries[1:], strict=False)), text
        for entry in entries:
            assert entry.text.startswith(broken(text).split("\n")[entry.line - 1][entry.column - 1]), text
    assert parsed > 1000 and refused > 1000


HOSTILE = """
import sys
sys.path.insert(0, sys.argv[1])
from adastate_core.prompts.demo_words import words_over_time
from adastate_core.prompts.timeline import LONGEST_TEXT, TimelineError, grammar_of, parse_timeline

def filled(front, piece, end=""):
    return (front + piece * (LONGEST_TEXT // len(piece)))[: LONGEST_TEXT - len(end)] + end

runs = ["[", "[5s: ", "a [1s] | ", "{", "[{", "5s ", "|", " ", "\\n", "\\n0s ", "[1 ", "#", "1", "1.", ":", "a", "\\t", "}", "]",
        ";", "\\u2028", "0:00 ", "x 0:05 ", "#5\\n", "\\n\\u200b"]
texts = [filled(front, piece) for front in ("", "[1", "[1 {", "0s a\\n", "a [5s") for piece in runs]
texts += ["[1" + " " * 60_000 + gap + " " * 60_000 + "{" + "a" * 70_000 for gap in ("", "#", "x")]
texts += ["".join(f"{i}s a\\n" for i in range(10_000)), "".join(f"[{i}s: a]" for i in range(10_000)), filled("", "a[1s]|", "a")]
for text in texts if sys.argv[2] == "all" else texts[int(sys.argv[2]) % 4 :: 4]:
    for read in (parse_timeline, grammar_of, words_over_time):
        try:
            read(text)
        except TimelineError:
            pass
print(len(texts))
"""


def test_long_texts_do_not_take_forever():
    """A sample of texts as long as any is read; whoever goes through them more than a few times is ended."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(ROOT), sampled.WISH], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0 and done.stdout == "131\n", done.stderr[-2000:]


def test_what_people_mean_as_a_timeline_is_one():
    cat_and_dog = [(0, "a cat", None), (5, "a dog", None)]
    for text in (
        "0:00-0:05 a cat\n0:05-0:10 a dog",
        "0-5s: a cat\n5-10s: a dog",
        "0 - 5s a cat\n5s \u2013 10s a dog",
        "0:00-0:05: a cat\n5s a dog",
        "\ufeff0:00 a cat\n0:05 a dog",
        "0:00 a cat\r0:05 a dog",
        "0:00 a cat\r\n0:05 a dog\r\n",
    ):
        assert read(text) == cat_and_dog, text
        assert grammar_of(text) == "lines"
    assert read("0-5s {cut} a cat\n5s a dog")[0] == (0, "a cat", "cut")
    for text, place, words in (
        ("0-5s a cat\n6-10s a dog", (2, 1), "the prompt before ends at 5s and this begins at 6s"),
        ("0-0s a cat\n6-10s a dog", (1, 3), "the prompt ends at 0s, no later than it begins"),
        ("\uff10:\uff10\uff10 a cat\n\uff10:\uff10\uff15 a dog", (1, 1), "is no time in the digits 0 to 9"),
        ("0s a cat\r \u0665s a dog", (2, 2), "is no time in the digits 0 to 9"),
        ("a cat [\uff15s: a dog]", (1, 8), "is no time in the digits 0 to 9"),
    ):
        with pytest.raises(TimelineError, match=words) as refusal:
            parse_timeline(text)
        assert (refusal.value.line, refusal.value.column) == place, text
    assert read("\uff11\uff16:9 and 3-4 dogs, 5s apart") == [(0, "\uff11\uff16:9 and 3-4 dogs, 5s apart", None)]


def test_places_are_those_that_counting_gives():
    chance = random.Random(3)
    for _ in range(300):
        text = "".join(chance.choice("a\n \r") for _ in range(chance.randrange(40)))
        source = _Source(text)
        for at in range(len(text) + 1):
            before = broken(text)[:at].split("\n")
            assert source.place(at) == (len(before), len(before[-1]) + 1)


def test_what_is_longer_than_a_timeline_is_refused():
    assert parse_timeline("a" * LONGEST_TEXT)
    with pytest.raises(TimelineError, match=f"the text has {LONGEST_TEXT + 1} characters; at most {LONGEST_TEXT} are"):
        parse_timeline("a" * (LONGEST_TEXT + 1))
    most = "\n".join(f"{i}s a" for i in range(MOST_PROMPTS))
    assert len(parse_timeline(most)) == MOST_PROMPTS
    with pytest.raises(
        TimelineError, match=f"there are {MOST_PROMPTS + 1} prompts; a timeline holds at most"
    ) as refusal:
        parse_timeline(f"{most}\n{MOST_PROMPTS}s a")
    assert refusal.value.line == MOST_PROMPTS + 1
    many = [TimedText(float(i), "a") for i in range(MOST_PROMPTS + 1)]
    with pytest.raises(ValueError, match=f"there are {MOST_PROMPTS + 1} prompts"):
        format_timeline(many)
    with pytest.raises(ValueError, match="prompts begin at .*, ...]; the first must be at 0") as refused:
        format_timeline(many[1:])
    assert len(str(refused.value)) < 300
    with pytest.raises(ValueError, match=f"there are {MOST_PROMPTS + 1} prompts; a video has at most"):
        Prompts(tuple(PromptAt(entry.seconds, None) for entry in many))


@pytest.mark.parametrize("shared", ["b" * 300, "b {} " * 100])
def test_what_is_shared_is_not_written_out_without_end(shared):
    text = "\n".join(f"{i}s a balloon" for i in range(9_000))
    with pytest.raises(TimelineError, match=r"9000 prompts with what they share have \d+ characters; they may have"):
        parse_timeline(text, shared)
    whole = sum(len(entry.text) for entry in parse_timeline(text, shared[:20]))
    assert whole <= MOST_WORDS


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_written_timelines_read_the_same(grammar):
    """Random timelines: what can be written reads as what it was, and plain words can always be written."""
    chance = random.Random(11)
    words = ["a meadow", "90 dogs", "the hat, red", "x // y", "{cut} fast", "a [b] c", "a | b", "]", "é", "two\nlines"]
    written = refused = 0
    for _ in range(500):
        times = sorted(
            {0.0, *(chance.choice([chance.uniform(0, 9), chance.randrange(9000) / 8, 1e-9]) for _ in range(3))}
        )
        plain = chance.random() < 0.5
        texts = [chance.choice(words[:2] if plain else words) for _ in times]
        entries = tuple(
            TimedText(s, text, chance.choice([None, *TRANSITIONS])) for s, text in zip(times, texts, strict=True)
        )
        try:
            text = format_timeline(entries, grammar)
        except ValueError as refusal:
            assert not plain and "cannot be written as" in str(refusal)
            refused += 1
            continue
        assert parse_timeline(text) == entries
        written += 1
    assert written > 200 and refused > 5


def test_one_timeline_in_all_grammars():
    entries = [TimedText(0.0, "a"), TimedText(5.0, "b", "rope cut"), TimedText(62.5, "c", "cut")]
    assert format_timeline(entries) == "0s a\n5s {rope cut} b\n62.5s {cut} c"
    assert format_timeline(entries, "marks") == "[0s: a]\n[5s {rope cut}: b]\n[62.5s {cut}: c]"
    assert format_timeline(entries, "bars") == "a [5s] | b [57.5s {rope cut}] | c [{cut}]"


@pytest.mark.parametrize(
    ("entries", "grammar", "message"),
    [
        ([], "lines", "no prompts"),
        ([TimedText(1.0, "a")], "lines", "the first must be at 0"),
        ([TimedText(0.0, "a"), TimedText(math.nan, "b")], "lines", "times must rise"),
        ([TimedText(0.0, "a")], "scroll", "grammar is 'scroll'; it must be one of bars, marks, lines"),
        ([TimedText(0.0, "a"), TimedText(1.0, "b | c")], "bars", "prompt 2 cannot be written as bars: 'b | c'"),
        ([TimedText(0.0, "a [")], "marks", "prompt 1 cannot be written as marks"),
        ([TimedText(0.0, "a\n5 b")], "lines", "prompt 1 cannot be written as lines"),
        ([TimedText(0.0, " a")], "lines", "prompt 1 cannot be written as lines"),
        ([TimedText(0.0, "a", "zoom")], "bars", "with transition 'zoom'"),
    ],
)
def test_what_cannot_be_written(entries, grammar, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        format_timeline(entries, grammar)


def test_the_grammar_needs_no_torch():
    words = "from adastate_core.prompts.timeline_format import *; print(parse_timeline('a'))"
    code = f"import sys; sys.modules['torch'] = None; {words}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_prompts_are_checked():
    first, later = PromptAt(0.0, "X"), PromptAt(5.0, "Y", "soft", 2, "spherical", "words")
    assert "X" not in repr(first) and "words" in repr(later)
    prompts = Prompts((first,)).with_entry(later).with_entry(PromptAt(2.5, "Z"))
    assert [entry.conditioning for entry in prompts.entries] == ["X", "Z", "Y"]
    assert listing(prompts) == "0:00\n0:02.5 {recache}\n0:05 {soft} words"
    assert listing(Prompts((first, PromptAt(3661.0, None, text="a\nb")))).endswith("1:01:01 {recache} a b")
    with pytest.raises(ValueError, match="there is a prompt at 5s already"):
        prompts.with_entry(PromptAt(5.0, "W"))
    for entries, message in (
        ((), "no prompts"),
        ((later,), "one must begin at 0"),
        ((first, later, PromptAt(5.0, None)), "seconds must rise"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompts(entries)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"transition": "zoom"}, "transition is 'zoom'; it must be one of cut, recache"),
        ({"blend": "cubic"}, "blend is 'cubic'"),
        ({"chunks": 0}, "blend_chunks is 0"),
        ({"chunks": 101}, "blend_chunks is 101"),
        ({"chunks": True}, "blend_chunks is True"),
    ],
)
def test_a_prompt_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptAt(**({"seconds": 0.0, "conditioning": None} | fields))


def slowly_blended(a, b, t: float, kind: str) -> list[list[float]]:
    """Row by row in Python floats; a row turns by Rodrigues' rotation in the plane of the two, not by the slerp formula."""
    width, rows = a.shape[2], max(a.shape[1], b.shape[1])
    result = []
    for n in range(rows):
        x = a[0, n].double().tolist() if n < a.shape[1] else [0.0] * width
        y = b[0, n].double().tolist() if n < b.shape[1] else [0.0] * width
        long_x, long_y = math.hypot(*x), math.hypot(*y)
        straight = [(1 - t) * p + t * q for p, q in zip(x, y, strict=True)]
        if kind == "linear" or not long_x or not long_y:
            result.append(straight)
            continue
        u = [p / long_x for p in x]
        along = sum(p * q for p, q in zip(u, y, strict=True))
        across = [q - along * p for p, q in zip(u, y, strict=True)]
        off = math.hypot(*across)
        if off < 1e-6 * long_y:
            result.append(straight)
            continue
        angle = math.atan2(off, along)
        v = [p / off for p in across]
        # Lengths of the two parts by the law of sines, expressed in the basis (u, v).
        share_x, share_y = (math.sin(s * angle) / math.sin(angle) for s in (1 - t, t))
        on_u = share_x * long_x + share_y * long_y * math.cos(angle)
        on_v = share_y * long_y * math.sin(angle)
        result.append([on_u * p + on_v * q for p, q in zip(u, v, strict=True)])
    return result


@pytest.mark.parametrize("kind", ["linear", "spherical"])
@pytest.mark.parametrize("rows", [(4, 4), (3, 6), (6, 3)])
def test_blends_against_a_slow_version(kind, rows):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(1, n, 16, generator=generator) * 3 for n in rows)
    a[0, 0] = 0
    b[0, 1] = a[0, 1] * 2  # on one line
    b[0, 2] = -a[0, 2]
    for t in (0.1, 0.5, 0.9):
        got = blended(a, b, t, kind)
        assert got.shape == (1, max(rows), 16) and got.dtype == torch.float32
        torch.testing.assert_close(
            got[0].double(), torch.tensor(slowly_blended(a, b, t, kind)).double(), rtol=2e-5, atol=2e-5
        )


def test_a_turn_keeps_the_length_and_halves_the_angle():
    x, y = torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)
    x[..., 0], y[..., 1] = 2, 2
    assert torch.allclose(blended(x, y, 0.5, "spherical"), torch.tensor([[[2**0.5, 2**0.5, 0, 0]]]))
    assert torch.allclose(blended(x, y, 0.5, "linear"), torch.tensor([[[1.0, 1.0, 0, 0]]]))


def test_the_ends_of_a_blend_are_the_embeddings_and_types_are_kept():
    a, b = torch.randn(1, 3, 8).bfloat16(), torch.randn(1, 5, 8).bfloat16()
    for kind in ("linear", "spherical"):
        assert torch.equal(blended(a, b, 0, kind), a) and torch.equal(blended(a, b, 1.0, kind), b)
        assert blended(a, b, 0.5, kind).dtype == torch.bfloat16
        assert blended(a, b, 0.5, kind).isfinite().all()
    for bad in ((a, b.float(), 0.5), (a, b[..., :4], 0.5), (a, b, 1.5), (a, b, math.nan), (a, b, 0.5, "cubic")):
        with pytest.raises(ValueError):
            blended(*bad)


def test_the_demos_words_over_time():
    read = words_over_time("Snow, gold balloon [5s] | no lantern slow pace city [5s#] | any terrain lantern")
    assert [words for _, words in read] == [
        DEFAULTS | {"terrain": "snow", "balloon": "gold"},
        {"terrain": "city", "pace": "slow", "balloon": "gold", "lantern": "no lantern"},
        {"terrain": "any", "pace": "slow", "balloon": "gold", "lantern": "lantern"},
    ]
    assert [entry.transition for entry, _ in read] == [None, "rope cut", None]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("0s snow\n// moon\n5s city,\n\n  red moon", (5, 3), "found 'red'; the demo model knows meadow, desert"),
        ("snow [5s: desert slow fast]", (1, 23), "found 'fast' behind 'slow'; a prompt says its pace once"),
        ("any lantern", (1, 1), "found 'any'"),
        ("no moon", (1, 1), "found 'no'"),
        ("snow [5s] | city any", (1, 18), "found 'any'"),
        ("0s snow\n5s", (2, 1), "is empty"),
    ],
)
def test_words_that_the_demo_does_not_know(text, place, message):
    with pytest.raises(TimelineError) as refusal:
        words_over_time(text)
    assert (refusal.value.line, refusal.value.column) == place and message in str(refusal.value)
