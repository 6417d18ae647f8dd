"""Timelines that mean harm: the three grammars, and texts of other programs, changed by letters, tokens and lengths."""

from __future__ import annotations

import random

WHOLE = (
    "0:00 a red balloon over a meadow\n0:05 {soft} a desert\n0:10.5 {seed 7} {strength 0.5} a city\n",
    "0s meadow, crimson balloon\n5s snow, lantern\n10s {cut} city, gold balloon, fast",
    "a cat [5s: a dog] [10s {cut}: a bird] [15s {shot}]",
    "[0s: a][2.5s: b][1:00:00: c]",
    "a cat [5s] | a dog [3s {flush}] | a bird",
    "a | b | c",
    "0s-5s a\n5s to 10s b\n10s \u2192 15s c",
    "1\n00:00:00,000 --> 00:00:05,000\na\n\n2\n00:00:05,000 --> 00:00:10,000\nb\n",
    "// a comment\n0:00 meadow\n0:05 city",
)
TOKENS = (
    "\ufeff",
    "\0",
    "\r",
    "\r\n",
    "\u2028",
    "\x85",
    "\u202e",
    "\u200b",
    "\ud800",
    "\t",
    "\x1b[31m",
    "\u0665s",
    "\uff15s",
    "\u00b2s",
    "1e400s",
    "9" * 400 + "s",
    "0." + "0" * 400 + "1s",
    "-5s",
    "+5s",
    "nans",
    "infs",
    "360001s",
    "99:99",
    "1:60",
    "0:00:00:00",
    "5s5s",
    "[",
    "]",
    "[[",
    "{",
    "}",
    "{}",
    "{soft}",
    "{seed -1}",
    "{seed 1e9}",
    "{seed " + "9" * 400 + "}",
    "{strength nan}",
    "{strength 2}",
    "{nothing}",
    "{soft}{cut}",
    "|",
    "||",
    "| |",
    "//",
    "#",
    "5s",
    "[5s]",
    "[5s:",
    "[5s: a]",
    "0s",
    "0:05",
    " to ",
    "-->",
    "\u0661\u0662:\u0663\u0664",
    "a" * 3000,
    "\U0001f600",
    "e\u0301" * 50,
    "$(touch x)",
    "../../x",
    "%s",
    "<b>",
    "0x10s",
    "1_0s",
    ".5s",
    "5.s",
    "5,5s",
    "five seconds",
    "\\n",
)
_PUMPED = (
    "[",
    "]",
    "{",
    "}",
    "|",
    " ",
    "\n",
    "0",
    "5s",
    "0:00 ",
    "[5s",
    "[5s: a]",
    "{soft} ",
    "// ",
    "a | ",
    "-->",
    "0s to ",
    "1:",
    "1.",
    " \n",
    "\u200b",
    "5s a\n",
    "[{",
    "\t ",
    "#",
    "0:00\n",
    "a [5s] | ",
    "\ufeff0",
    "00:00:",
    "1 - ",
    "-",
    "\u0665",
    ": ",
)


def hostile(chance: random.Random) -> tuple[str, str]:
    """(text, what was done)."""
    if chance.random() < 0.3:
        return _pumped(chance)
    text, done = chance.choice(WHOLE), []
    for _ in range(chance.choice([1, 1, 2, 3, 6])):
        at, how = (
            chance.randrange(len(text) + 1),
            chance.choice(["token", "token", "token", "drop", "swap", "twice", "letter", "case"]),
        )
        if how == "token":
            token = chance.choice(TOKENS)
            text = text[:at] + token + text[at:]
            done.append(ascii(token)[:20])
            continue
        if how == "drop":
            text = text[:at] + text[at + chance.choice([1, 2, 9]) :]
        elif how == "swap":
            text = text[at:] + text[:at]
        elif how == "twice":
            text = text + chance.choice(["", "\n", " | "]) + text
        elif how == "letter" and text:
            text = (
                text[:at] + chr(chance.choice([chance.randrange(32, 127), chance.randrange(0xD7FF)])) + text[at + 1 :]
            )
        elif how == "case":
            text = text.upper()
        done.append(how)
    return text, f"{done} {ascii(text)[:300]}"


def _pumped(chance: random.Random) -> tuple[str, str]:
    """A piece over and over, up to the longest text that is taken and beyond."""
    piece, other = chance.choice(_PUMPED), chance.choice(_PUMPED)
    most = chance.choice([3000, 60_000, 199_900, 199_900, 201_000])
    how = chance.choice(["one", "one", "both", "front", "end", "lines"])
    if how == "lines":
        text = "\n".join(f"{i}s {piece}" for i in range(most // (8 + len(piece))))
        return text, f"lines {most} {piece!r}"
    unit = piece + other if how == "both" else piece
    text = unit * (most // len(unit))
    text = {"front": "0:00 a\n" + text, "end": text + other + "5s a"}.get(how, text)
    return text[:201_000], f"{how} {most} {piece!r} {other!r}"
