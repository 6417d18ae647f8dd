"""Prompts over time as a value: which conditioning holds from which second on, how the video changes to it, and which seed and
strength hold.

The texts that people write for it are read in timeline.py and written in prompts/timeline_format.py; their names can be imported
from here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .entry_options import MOST_SEED, EntryOptions
from .timeline import LONGEST, MOST_PROMPTS, TRANSITIONS, TimedText, TimelineError, locate, parse_timeline
from .timeline_format import GRAMMARS, format_timeline

__all__ = [
    "BLENDS",
    "GRAMMARS",
    "LONGEST",
    "MOST_CHUNKS",
    "TRANSITIONS",
    "PromptAt",
    "Prompts",
    "TimedText",
    "TimelineError",
    "blended",
    "format_timeline",
    "listing",
    "locate",
    "parse_timeline",
]

BLENDS = ("linear", "spherical")
MOST_CHUNKS = 100
# Closer to one line than this, the angle between two rows says nothing in float32.
_PARALLEL = 1 - 1e-6


@dataclass(frozen=True, eq=False)
class PromptAt:
    """A prompt from `seconds` of video on; with transition "soft" it comes in over `chunks` chunks by `blend`.

    `seed` of the noise and `strength` of the adaptive anchor hold from there on, None: as before. Where `conditioning` is None the
    words stay as they were. `opening`: what the first chunk of a shot has in its place, None: the same. Raises ValueError for
    numbers and names outside their range. Compared by identity: it holds tensors.
    """

    seconds: float
    conditioning: Any = field(repr=False)
    transition: str = "recache"
    chunks: int = 3
    blend: str = "linear"
    text: str = ""
    seed: int | None = None
    strength: float | None = None
    opening: Any = field(default=None, repr=False)

    @property
    def has_words(self) -> bool:
        """Whether the prompt changes here, and not only a number."""
        return self.conditioning is not None or bool(self.text)

    def __post_init__(self) -> None:
        if not (isinstance(self.seconds, (int, float)) and 0 <= self.seconds <= LONGEST):
            raise ValueError(f"seconds is {self.seconds}; it must be between 0 and {LONGEST}")
        if self.transition not in TRANSITIONS:
            raise ValueError(f"transition is {self.transition!r}; it must be one of {', '.join(TRANSITIONS)}")
        if type(self.chunks) is not int or not 1 <= self.chunks <= MOST_CHUNKS:
            raise ValueError(f"blend_chunks is {self.chunks}; it must be a whole number between 1 and {MOST_CHUNKS}")
        if self.blend not in BLENDS:
            raise ValueError(f"blend is {self.blend!r}; it must be one of {', '.join(BLENDS)}")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed <= MOST_SEED):
            raise ValueError(f"seed is {self.seed}; it must be a whole number between 0 and {MOST_SEED}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be above 0 and at most 1")


class TimelineSource(Protocol):
    """Where prompts come from that were written as a timeline, so that it can be gone on with while a video is made."""

    text: str

    def entries(self) -> tuple[TimedText, ...]:
        """Its entries, as they are written."""
        ...

    def read(self, text: str) -> Prompts:
        """The prompts of another text, as the node would make them. ValueError where it would refuse it; KeyError for words that
        were not encoded."""
        ...


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one video, at least one, the first at second 0, seconds strictly rising; else ValueError.

    Each holds until the next begins. The first one's transition is never used. `source`: the timeline that they were read from, if
    they were.
    """

    entries: tuple[PromptAt, ...]
    source: TimelineSource | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("there are no prompts; give at least one, at second 0")
        if len(self.entries) > MOST_PROMPTS:
            raise ValueError(f"there are {len(self.entries)} prompts; a video has at most {MOST_PROMPTS}")
        if self.entries[0].seconds != 0:
            raise ValueError(f"the first prompt begins at {self.entries[0].seconds:g}s; one must begin at 0")
        for before, entry in zip(self.entries, self.entries[1:], strict=False):
            if not before.seconds < entry.seconds:
                raise ValueError(
                    f"a prompt at {entry.seconds:g}s follows one at {before.seconds:g}s; seconds must rise"
                )

    @property
    def worded(self) -> tuple[PromptAt, ...]:
        """Those at which the words change."""
        return tuple(entry for entry in self.entries if entry.has_words)

    def with_entry(self, entry: PromptAt) -> Prompts:
        """These prompts and one more, in order of time; ValueError when one begins at that second already."""
        if any(other.seconds == entry.seconds for other in self.entries):
            raise ValueError(f"there is a prompt at {entry.seconds:g}s already; give this one another second")
        return Prompts(tuple(sorted((*self.entries, entry), key=lambda prompt: prompt.seconds)))


def listing(prompts: Prompts) -> str:
    """One line a prompt: when it begins, by which transition (not for the first), which numbers it sets, and its text."""
    rows = []
    for number, entry in enumerate(prompts.entries):
        transition = entry.transition if number and entry.has_words else None
        options = EntryOptions(transition, entry.seed, entry.strength).written()
        change = f" {{{options}}}" if options else ""
        rows.append(f"{_clock(entry.seconds)}{change} {' '.join(entry.text.split())}".rstrip())
    return "\n".join(rows)


def _clock(seconds: float) -> str:
    """m:ss or h:mm:ss, to the millisecond where it is not whole."""
    whole, millis = divmod(round(seconds * 1000), 1000)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{front}:{rest:02}" + (f".{millis:03}".rstrip("0") if millis else "")


def blended(a: Tensor, b: Tensor, t: float, kind: str = "linear") -> Tensor:
    """The text embedding a share `t` (0..1) of the way from `a` to `b`: [1, n, c] and [1, m, c] give [1, max(n, m), c].

    The shorter is padded with zero rows, as Wan's contexts are. "spherical" turns each row towards the other at an even
    angle (slerp over channels); rows that are zero or almost on one line go straight. float32 maths, dtype kept; at 0 and 1
    `a` and `b` themselves come back. Raises ValueError for embeddings that do not fit and for `t` or `kind` out of range.
    """
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2] or a.dtype != b.dtype:
        raise ValueError(
            f"embeddings are {list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}; to blend they must be [1, n, c] with "
            "one width and dtype: encode both with the same text encoder"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"t is {t}; it must be between 0 and 1")
    if kind not in BLENDS:
        raise ValueError(f"blend is {kind!r}; it must be one of {', '.join(BLENDS)}")
    if t in (0, 1):
        return b if t else a
    rows = max(a.shape[1], b.shape[1])
    x, y = (torch.nn.functional.pad(part.float(), (0, 0, 0, rows - part.shape[1])) for part in (a, b))
    straight = x + t * (y - x)
    return (straight if kind == "linear" else _turned(x, y, t, straight)).to(a.dtype)


def _turned(x: Tensor, y: Tensor, t: float, straight: Tensor) -> Tensor:
    """Slerp of rows [1, n, c] over the last axis; `straight` where the angle is not defined."""
    lengths = x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True)
    cosine = (x * y).sum(-1, keepdim=True) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    defined = (lengths > torch.finfo(torch.float32).tiny) & (cosine.abs() < _PARALLEL)
    angle = torch.acos(torch.where(defined, cosine, 0.0))
    turned = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    return torch.where(defined, turned, straight)
