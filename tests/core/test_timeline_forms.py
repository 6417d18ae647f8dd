"""What people write for times: read, or refused where it stands; and prompts with numbers in them stay one prompt."""

from __future__ import annotations

import random

import pytest

from adastate_core.prompts.timeline import TimelineError, grammar_of, parse_timeline

CAT_AND_DOG = [(0, "a cat"), (5, "a dog")]

READ = [
    "0:00-0:05 a cat\n0:05-0:10 a dog",
    "0:00 to 0:05 a cat\n0:05 to 0:10 a dog",
    "0:00 until 0:05: a cat\n0:05 till 0:10: a dog",
    "0:00 -> 0:05 a cat\n0:05 --> 0:10 a dog",
    "0:00\u21920:05 a cat\n0:05~0:10 a dog",
    "0:00\u20140:05 a cat\n0:05\u22120:10 a dog",
    "0 to 5s a cat\n5 to 10s a dog",
    "0:00-5s a cat\n5s-0:10 a dog",
    "00:00.000 --> 00:05.000\na cat\n\n00:05.000 --> 00:10.000\na dog",
    "[0s-5s: a cat] [0:05 \u2192 0:10: a dog]",
    "\u200b0:00 a cat\n\u200b0:05 a dog",
    "\u202a0:00 a cat\r\n\u20600:05 a dog",
    "\ufeff\ufeff0:00 a cat\r0:05 a dog",
    "\u00ef\u00bb\u00bf0:00 a cat\n0:05 a dog",
    "\u00a00:00\u00a0a cat\n\t0:05\ta dog",
    "0:00 a cat\n\n// why\n0:05 a dog",
]

# (text, line, column)
REFUSED = [
    ("[0:00] a cat\n[0:05] a dog", 1, 8),
    ("00:00:00,000 --> 00:00:05,000\na cat", 1, 1),
    ("1\n00:00:00,000 --> 00:00:05,000\na cat\n\n2\n00:00:05,000 --> 00:00:10,000\na dog", 2, 1),
    ("WEBVTT\n\n00:00.000 --> 00:05.000\na cat", 3, 1),
    ("00:00:05:12 a dog", 1, 1),
    ("5 seconds: a dog", 1, 1),
    ("a cat\n5 seconds - a dog", 2, 1),
    ("0:00 a cat\n5 seconds: a dog", 2, 1),
    ("0 seconds: a cat\n5 seconds: a dog", 2, 1),
    ("0-5 seconds: a cat\n5-10 seconds: a dog", 1, 1),
    ("5sec - a dog", 1, 1),
    ("0.5 s: a dog", 1, 1),
    ("5min: a dog", 1, 1),
    ("1m30s a dog", 1, 1),
    ("0h05m a dog", 1, 1),
    ("t=5: a dog", 1, 1),
    ("a cat\nt = 5 a dog", 2, 1),
    ("T+5 a dog", 1, 1),
    ("@5s a dog", 1, 1),
    ("at 5s: a dog", 1, 1),
    ("at 0:05 a dog", 1, 1),
    ("from 0:00 to 0:05 a cat", 1, 1),
    ("second 5: a dog", 1, 1),
    ("First 5 seconds: a cat. Next 5 seconds: a dog", 1, 1),
    ("#5: a dog", 1, 1),
    ("#0 a cat\n#48 a dog", 1, 1),
    ("frame 48: a dog", 1, 1),
    ("Frame 0-48: a cat", 1, 1),
    ("0: a cat\n48: a dog", 1, 1),
    ('"0": "a cat",\n"48": "a dog"', 1, 1),
    ('{"0": "a cat", "48": "a dog"}', 1, 2),
    ('[(0, "a cat"), (5, "a dog")]', 1, 3),
    ("0-5: a cat\n5-10: a dog", 1, 1),
    ("0,a cat\n5,a dog", 1, 1),
    ("0.0 a cat\n5.0 a dog", 1, 1),
    ("(0:05) a dog", 1, 2),
    ("<0:05> a dog", 1, 2),
    ("{0:05} a dog", 1, 2),
    ("\u30100:05\u3011a dog", 1, 2),
    ("**0:05** a dog", 1, 3),
    ("'0:05' a dog", 1, 2),
    ("- 0:00 a cat\n- 0:05 a dog", 1, 3),
    ("1. 0:00 a cat\n2. 0:05 a dog", 1, 4),
    ("1) 0s a cat\n2) 5s a dog", 1, 4),
    ("(5s) a cat\n(10s) a dog", 1, 2),
    ("Scene 1 (0:00-0:05): a cat", 1, 10),
    ("Shot 2 [0:05-0:10] a dog", 1, 9),
    ("Part 1 0-5s: a cat", 1, 8),
    ("0:05, a dog", 1, 1),
    ("0:05; a dog", 1, 1),
    ("0:05) a dog", 1, 1),
    ("0:05= a dog", 1, 1),
    ("0:05,5 a dog", 1, 1),
    ("1,5s a dog", 1, 1),
    ("0:00.a cat", 1, 1),
    ("0:0 a cat\n0:5 a dog", 1, 1),
    ("0;00 a cat\n0;05 a dog", 1, 1),
    ("0s, a cat\n5s, a dog", 1, 1),
    ("5s) a dog", 1, 1),
    ("0:60 a dog", 1, 1),
    ("-0:05 a dog", 1, 1),
    ("0\uff1a05 a dog", 1, 1),
    ("0\u223605 a dog", 1, 1),
    ("5s\uff1aa dog", 1, 1),
    ("\uff10:\uff10\uff10 a cat", 1, 1),
    ("\uff15\u79d2 a dog", 1, 1),
    ("5\u79d2 a dog", 1, 1),
    ("\u0660:\u0660\u0665 a dog", 1, 1),
    ("\u0966:\u0966\u096b a dog", 1, 1),
    ("0\u200b:05 a dog", 1, 1),
    ("a cat\u20280:05 a dog", 1, 7),
    ("0:00 a cat\u20280:05 a dog", 1, 12),
    ("0:00 a cat\x850:05 a dog", 1, 12),
    ("0:00 a cat\x0b0:05 a dog", 1, 12),
    ("0:00 a cat\\n0:05 a dog", 1, 13),
    ("0:00 a cat<br>0:05 a dog", 1, 15),
    ("0:00 a cat; 0:05 a dog", 1, 13),
    ("0:00 a cat, 0:05 a dog", 1, 13),
    ("0:00 a cat 0:05 a dog", 1, 12),
    ("a cat from 0:00 to 0:05, a dog from 0:05 to 0:10", 1, 12),
    ("a cat (0-5s), a dog (5-10s)", 1, 8),
    ("0:00-0:05 a cat\n0:06-0:10 a dog", 2, 1),
    ("0:00 to 0:05 a cat\n0:04 a dog", 2, 1),
    ("0:05 a dog\n0:00 a cat", 1, 1),
    ("0:00 a cat\n0:05 a dog\n0:03 a bird", 3, 1),
    ("0:00 a cat\n0:00 a dog", 2, 1),
]

PLAIN = [
    "2 cats", "3:2 aspect ratio photo", "1960s diner", "16:9 cinematic shot", "9:16 vertical portrait of a woman",
    "4K ultra detailed city", "35mm film photo", "24-70mm lens", "50mm f1.8 portrait", "1:64 scale model car",
    "1:12 miniature house", "4:30 pm light over a harbor", "12:00 noon duel in a western town", "90 sheep on a hill",
    "100 dancers in a square", "3 people walking", "3-4 dogs running", "5-10 people in a queue", "1920s-1930s fashion",
    "1980s synthwave highway", "2001: a space odyssey style corridor", "1 girl, red hair", "1girl, solo, red dress",
    "(masterpiece:1.2), 2 cats", "((best quality)), 8k", "(90s style:1.3) anime girl", "(1980s:1.2) diner",
    "[2 dogs], 16:9", "60 fps smooth slow motion", "24 fps film look", "a clock showing 10:10", "a bomb timer showing 0:05",
    "a digital clock that reads 12:34", "open 9:00-17:00, a shop sign", "a cafe sign saying 9:00-17:00 in the rain",
    "30 second commercial of a car", "5 minutes to midnight, a doomsday clock", "10 seconds before the explosion",
    "5 minute sketch of a cat", "5'11\" tall man", "6ft tall man", "1/2 scale mech", "100% cotton shirt",
    "#1 dad mug on a desk", "#hashtag neon sign", "Shot 1: a cat\nShot 2: a dog", "1. a cat\n2. a dog", "- a cat\n- a dog",
    "Scene 1: 2 cats on a roof", "at 5:30 in the morning a fisherman sets out", "At 12 noon the square is empty",
    "2:35:1 anamorphic street", "2.39:1 widescreen desert", "360 degree view of a room", "7 days a week diner",
    "1st place medal", "3D render of a robot", "50/50 split screen", "0.5x slow motion of a wave", "F1 car at 300 km/h",
    "t-shirt on a line", "Time lapse of clouds", "5G tower at dusk", "a meadow, 90s sitcom look", "42",
    "Room 101, a long corridor", "$5 bill on a table", "20,000 leagues under the sea", "10:1 macro of an ant",
    "747 landing at dusk", "a cat; a dog; 3 birds", "first light, then 2 riders", "seconds before dawn, a quiet street",
    "frame within a frame, 3 mirrors", "a man says: 5 more minutes", "1,000 lanterns rising", "2 to 3 dancers in red",
    "8 mm film grain", "5 a side football on a rainy pitch", "Apollo 11 launch, 1969", "a scoreboard 3-2, 0-0",
    "zoom from 0 to 100", "route 66, 50s cars", "4 seasons in one tree", "5m tall statue", "12 angry men around a table",
    "10 am market", "7:00 AM, empty street", "1970s-80s disco", "3/4 view of a face", "16:10 monitor on a desk",
    "8 planets: a diagram", "2 frames on a wall", "1 minute of silence, a crowd", "a runner, 9.58 seconds, stadium",
]  # fmt: skip


@pytest.mark.parametrize("text", READ, ids=ascii)
def test_ranges_and_odd_marks_are_read(text):
    assert [(e.seconds, e.text) for e in parse_timeline(text)] == CAT_AND_DOG
    assert grammar_of(text) in ("lines", "marks")


@pytest.mark.parametrize(("text", "line", "column"), REFUSED, ids=ascii)
def test_what_looks_like_a_time_is_read_or_refused_where_it_stands(text, line, column):
    with pytest.raises(TimelineError) as refusal:
        parse_timeline(text)
    assert (refusal.value.line, refusal.value.column) == (line, column), str(refusal.value)
    assert len(str(refusal.value)) < 320 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", PLAIN, ids=ascii)
def test_a_prompt_with_numbers_stays_one(text):
    (entry,) = parse_timeline(text)
    assert (entry.seconds, entry.text, entry.transition) == (0, text, None)
    (later,) = parse_timeline(f"a street,\n{text}") if not text[0].isdigit() else parse_timeline(f"a street, {text}")
    assert later.text.endswith(text)


def test_a_time_in_front_makes_a_prompt_of_what_looks_like_one():
    """What a refusal says to do."""
    for text, _, _ in REFUSED:
        if "\n" in text or "[" in text or text.startswith(("{", "-", "0:00", "a cat")):
            continue
        (entry,) = parse_timeline(f"0s {text}")
        assert entry.text == text


def test_a_decade_in_a_timeline_is_a_time_as_ever():
    with pytest.raises(TimelineError, match="the first prompt begins at 1960s"):
        parse_timeline("1960s diner\n1970s a dog")
    assert [e.seconds for e in parse_timeline("a diner\n1960s a dog")] == [0, 1960]


def test_no_marked_text_becomes_one_prompt_in_silence():
    """Two prompts put together from pieces that people use for times: read as two, or refused; never as one."""
    chance = random.Random(16)
    clocks = [
        "{m}:{s:02}",
        "{t}s",
        "0{m}:{s:02}",
        "00:0{m}:{s:02}",
        "{t} sec",
        "{t} seconds",
        "t={t}",
        "frame {t}",
        "#{t}",
    ]
    fronts = ["", "- ", "(", "[", "<", "Scene 1 ", "1. ", "\u200b", "\u2022 ", "@"]
    behinds = [" ", ": ", " - ", "] ", ") ", "> ", ", ", "\uff1a", " | ", " = "]
    breaks = ["\n", "\r", "\r\n", "\u2028", "\n\n"]
    two = refused = 0
    for _ in range(3000):
        clock, front, behind = chance.choice(clocks), chance.choice(fronts), chance.choice(behinds)
        if "{m}" not in clock and (behind == " " or front == "@" or behind == " | "):
            continue  # "5 sec" and words may be words
        ends = chance.random() < 0.3
        rows = []
        for m, s, words in ((0, 0, "a cat"), (1, 5, "a dog")):
            time = clock.format(m=m, s=s, t=60 * m + s)
            until = f"-{clock.format(m=m + 1, s=5, t=60 * m + 65)}" if ends else ""
            rows.append(f"{front}{time}{until}{behind}{words}")
        text = chance.choice(breaks).join(rows)
        try:
            entries = parse_timeline(text)
        except TimelineError as error:
            assert error.line >= 1 and error.column >= 1
            refused += 1
            continue
        assert [e.seconds for e in entries] == [0, 65], (text, entries)
        two += 1
    assert two > 100 and refused > 1000
