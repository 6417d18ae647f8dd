"""What the anchor slots of the cache hold. One small frozen class a policy, each with its paper.

A policy answers these questions when a chunk has been committed: does a content frame go to the anchor instead of
the window (`slot_of`), what happens with a frame that leaves the window (`evicted`), what becomes of the clean state
(`state_committed`), and what else changes then (`committed`). It acts on one layer at a time, through a `LayerView`, and
takes keys and values as sources, which make them when they are called: what a source of the window gives is gone after
the commit.

`register` makes a policy of another pack known by its kind (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch

# raw key and value [B, P, width] of a frame, made when they are asked for
Source = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class LayerView(Protocol):
    """All that a policy may see of a layer, and do to it, while a chunk is committed. Frames are video frames; slots count
    from 0 to the policy's `frames` - 1."""

    @property
    def window_frames(self) -> int:
        """How many frames the layer's window holds when it is full."""
        ...

    def frame_in(self, slot: int) -> int | None:
        """The video frame that an anchor slot stands for, or None while it is empty."""
        ...

    @property
    def first_left(self) -> int | None:
        """The frame that left the window first at this commit; None before one has."""
        ...

    def set_anchor(self, slot: int, frame: int, source: Source) -> None:
        """Put a raw key and value into an anchor slot."""
        ...

    def blend_anchor(self, slot: int, source: Source, weight: float) -> None:
        """Move a filled anchor slot by `weight` towards a raw key and value, in float32. For policies that say `blends`."""
        ...

    def clear_anchor(self) -> None:
        """Empty every anchor slot."""
        ...

    def keep_first(self, first_frame: int, content_frames: int) -> None:
        """Keep those of the frames just committed that are among the video's first `replay_frames`."""
        ...

    def replay(self, source: int, frame: int) -> None:
        """Put the kept first frame `source` in the place, and at the position, of window frame `frame` unless a shot pins it."""
        ...


class RolloutNumbers(Protocol):
    """What a policy may check of the rollout that it is asked for (RolloutSpec), latent frames throughout."""

    chunk_frames: int
    window_frames: int
    positions: str
    blocks: int
    cache_dtype: str
    cache_device: str
    layers: Any
    absorption: Any


@dataclass(frozen=True)
class Selection:
    """What a policy asks for that chooses tokens by attention (cache/deep.py), in latent frames: `staged_frames` are read
    beside the sink once it has chosen, `query_frames` of them are the newest past ones, whose queries judge. `shift`: what
    was chosen moves in time. From the first cut on the sink stands `sink_back` frames further back than what follows it. A token
    is chosen at most `most_choices` times (0: no limit)."""

    staged_frames: int
    query_frames: int
    shift: bool
    sink_back: int = 0
    most_choices: int = 0


@dataclass(frozen=True)
class Anchor:
    """No anchor: what leaves the window is forgotten (Self-Forcing's rolling cache, arXiv 2506.08009)."""

    kind: ClassVar[str] = "none"
    state_frames: ClassVar[int] = 0
    relative_only: ClassVar[bool] = False
    blends: ClassVar[bool] = False
    state_after_past: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def check(self, rollout: RolloutNumbers) -> None:
        """ValueError, in a sentence, for a rollout whose other settings do not go with this policy."""

    def selection(self, chunk_frames: int) -> Selection | None:
        """For a policy that `selects`: what attention chooses of what lies between anchor and newest frames."""
        return None

    @property
    def frames(self) -> int:
        """A, the cache slots reserved for the anchor, in latent frames."""
        return 0

    def slot_of(self, frame: int) -> int | None:
        """The anchor slot that content frame `frame` goes to, or None if it enters the window."""
        return None

    @property
    def takes_evicted(self) -> bool:
        """Whether it is told of frames that leave the window; un-rotated keys are kept for it. It has to be `relative_only`."""
        return self.blends

    @property
    def replay_frames(self) -> int:
        """First content frames whose keys and values are kept beside the cache, to be put into the window again."""
        return 0

    def evicted(self, layer: LayerView, frame: int, source: Source, place: tuple[int, int] = (0, 1)) -> None:
        """Frame `frame` leaves the window of `layer`; `source` makes its raw key and value [B, P, heads * head_dim].

        `place` = (i, n): it is the i-th of n frames that leave at this commit.
        """

    def state_committed(self, layer: LayerView, states: Sequence[Source], first_frame: int = 0) -> None:
        """The clean state of the chunk from `first_frame` on is known: a source of raw key and value a state frame."""

    def committed(self, layer: LayerView, first_frame: int, content_frames: int) -> None:
        """Content frames `first_frame`... are in the cache, and what had to leave has left."""

    def bystander(self, end: int) -> Anchor:
        """The policy while frames before `end`, committed before, are committed again: what is in the anchor stays."""
        return Anchor()

    def at_rate(self, fps: float) -> Anchor:
        """The policy in a video of `fps` frames a second: other than itself only where it was given seconds."""
        return self

    def describe(self) -> dict[str, Any]:
        """Kind and numbers, JSON-able; equal descriptions mean equal behaviour."""
        return {"kind": self.kind} | asdict(self)

    @classmethod
    def described(cls, numbers: dict[str, Any]) -> Anchor:
        """The policy whose `describe` gave these numbers beside its kind, in this version or an earlier one."""
        return cls(**numbers)

    def difference(self, theirs: dict[str, Any]) -> str:
        """How a state's anchor of another description differs, a phrase."""
        return f"anchor is {theirs} in the state and {self.describe()} here"


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; an anchor needs at least 1 latent frame (use no anchor for 0)")


@dataclass(frozen=True)
class AnchorStatic(Anchor):
    """The first `sink_frames` content frames, kept for good (LongLive, arXiv 2509.22622; StreamingLLM's sink)."""

    kind: ClassVar[str] = "static"
    sink_frames: int = 3

    def __post_init__(self) -> None:
        _at_least_one("sink_frames", self.sink_frames)

    @property
    def frames(self) -> int:
        return self.sink_frames

    def slot_of(self, frame: int) -> int | None:
        return frame if frame < self.sink_frames else None


@dataclass(frozen=True)
class AnchorEMA(AnchorStatic):
    """A sink into which evicted frames are blended: slot f mod A becomes decay slot + (1 - decay) frame.

    Raw keys and values, kept in float32: in bfloat16 most updates vanish in rounding (Reward-Forcing's EMA sink).
    """

    kind: ClassVar[str] = "ema"
    relative_only: ClassVar[bool] = True
    blends: ClassVar[bool] = True
    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie between 0 (replace) and 1 (keep for good)")

    def evicted(self, layer: LayerView, frame: int, source: Source, place: tuple[int, int] = (0, 1)) -> None:
        layer.blend_anchor(frame % self.sink_frames, source, 1.0 - self.decay)


@dataclass(frozen=True)
class AnchorMemory(AnchorStatic):
    """A sink and two memory frames, a long one and a short one, that follow what leaves the window (MemRoPE).

    Until something leaves, the two frames behind the sink stand in the memories' slots, so every frame is there, in order. They are
    dropped when the window overflows first. Of the frames that leave at one commit the mean over frames and tokens, e
    [B, heads * head_dim] for keys and values, moves each memory to (1 - rate) memory + rate e, the same at every token; both begin
    as the first e. Raw, in float32.
    """

    kind: ClassVar[str] = "memory"
    relative_only: ClassVar[bool] = True
    blends: ClassVar[bool] = True
    long_rate: float = 0.01
    short_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rate in (("long_rate", self.long_rate), ("short_rate", self.short_rate)):
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name} is {rate}; it must lie between 0 (never move) and 1 (replace)")

    @property
    def frames(self) -> int:
        return self.sink_frames + 2

    def slot_of(self, frame: int) -> int | None:
        return frame if frame < self.frames else None

    def evicted(self, layer: LayerView, frame: int, source: Source, place: tuple[int, int] = (0, 1)) -> None:
        index, count = place
        key, value = (t.float().mean(1, keepdim=True).expand_as(t) for t in source())

        def mean() -> tuple[torch.Tensor, torch.Tensor]:
            return key, value

        long, short = self.sink_frames, self.sink_frames + 1
        # memories stand for the first frame that left, the same one; frames that stand in their slots for themselves
        first = layer.frame_in(long) if layer.frame_in(long) == layer.frame_in(short) else None
        for slot, rate in ((long, self.long_rate), (short, self.short_rate)):
            if first is None:
                layer.set_anchor(slot, frame, mean)
            elif first == layer.first_left:  # the first e is still being gathered
                layer.blend_anchor(slot, mean, 1.0 / (index + 1))
            else:
                share = rate / count  # what each of n frames has in the end, whichever order they come in
                layer.blend_anchor(slot, mean, share / (1.0 - (count - 1 - index) * share))


@dataclass(frozen=True)
class AnchorReplay(Anchor):
    """The early video played again beside the newest chunk (Rolling Sink).

    Keys and values of the first `first_frames` content frames are kept. Once the window has been full, every commit
    puts a block of them in place of the chunk before the newest one, at that chunk's own positions, as if the video
    went back and forth: backwards through the kept blocks but the last, with the frames of a block in reverse, then
    forwards, and so on.
    """

    kind: ClassVar[str] = "replay"
    first_frames: int = 21

    def __post_init__(self) -> None:
        _at_least_one("first_frames", self.first_frames)

    @property
    def replay_frames(self) -> int:
        return self.first_frames

    def block(self, turn: int, frames: int) -> list[int]:
        """The kept frames that replace a chunk of `frames` at the `turn`-th replacement."""
        blocks = max(1, self.first_frames // frames - 1)
        sweep, place = divmod(turn, blocks)
        back = sweep % 2 == 0
        number = blocks - 1 - place if back else place
        chosen = list(range(number * frames, (number + 1) * frames))
        return chosen[::-1] if back else chosen

    def committed(self, layer: LayerView, first_frame: int, content_frames: int) -> None:
        layer.keep_first(first_frame, content_frames)
        full = max(self.first_frames, layer.window_frames)
        if first_frame >= full and layer.window_frames >= 2 * content_frames:
            turn = (first_frame - full) // content_frames
            for i, source in enumerate(self.block(turn, content_frames)):
                layer.replay(source, first_frame - content_frames + i)


@dataclass(frozen=True)
class AnchorAdaptive(Anchor):
    """A hidden state, denoised with every chunk and never shown, replaces slots 0..S-1 (AdaState, arXiv 2605.30349).

    While it is denoised it has the positions of its slots, or with `state_after_past` those behind the past: neither is
    said where we could read it, and weights want what they were trained with. This pack's own: `strength` below 1 moves the
    slot only that far towards the new state, `freeze_frame` keeps it as it is from that latent frame on, and every
    `reset_frames` latent frames it is emptied (0: never, for both).
    """

    kind: ClassVar[str] = "adaptive"
    relative_only: ClassVar[bool] = True
    state_frames: int = 1  # type: ignore[misc]
    state_after_past: bool = False  # type: ignore[misc]
    strength: float = 1.0
    freeze_frame: int = 0
    reset_frames: int = 0

    def __post_init__(self) -> None:
        _at_least_one("state_frames", self.state_frames)
        if not 0.0 < self.strength <= 1.0:
            raise ValueError(f"strength is {self.strength}; it must be above 0 and at most 1 (replace the state)")
        for name, value in (("freeze_frame", self.freeze_frame), ("reset_frames", self.reset_frames)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must be a latent frame, or 0 for never")

    @property
    def frames(self) -> int:
        return self.state_frames

    @property
    def blends(self) -> bool:  # type: ignore[override]
        return self.strength < 1.0

    def state_committed(self, layer: LayerView, states: Sequence[Source], first_frame: int = 0) -> None:
        if self.freeze_frame and first_frame >= self.freeze_frame and layer.frame_in(0) is not None:
            return
        for slot in range(self.state_frames):
            if self.strength < 1.0 and layer.frame_in(slot) is not None:
                layer.blend_anchor(slot, states[slot], self.strength)
            else:
                layer.set_anchor(slot, slot, states[slot])

    def bystander(self, end: int) -> Anchor:
        if self.freeze_frame and end >= self.freeze_frame:
            return Anchor()
        return AnchorAdaptive(self.state_frames, self.state_after_past)

    def committed(self, layer: LayerView, first_frame: int, content_frames: int) -> None:
        end = first_frame + content_frames
        if self.reset_frames and first_frame // self.reset_frames != end // self.reset_frames:
            layer.clear_anchor()


@dataclass(frozen=True)
class AnchorDeep(AnchorStatic):
    """A deep sink, and of what lies between it and the newest frames only the tokens that those attend to (Deep Forcing,
    arXiv 2512.05081; cache/deep.py).

    A chunk that would read more than sink, window and itself together begins by cutting the cache down to `budget_frames`:
    the sink, `recent_frames`, of which the chunk itself is a part, and tokens worth what is left, C = budget - sink - recent.
    The chosen tokens stand between sink and recent frames in time, frame after frame, as the paper has it. Without
    `shift_selected` the rule is that of the authors' published code: each keeps its own distance to the chunk, the same token is
    chosen at most `most_choices` times, and from the first cut on the sink stands as many frames further back as a chunk has.
    `most_choices` 0 is what earlier versions did without `shift_selected`: no limit, and a sink that stays next to what follows.
    """

    kind: ClassVar[str] = "deep"
    relative_only: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    sink_frames: int = 10
    recent_frames: int = 4
    budget_frames: int = 16
    shift_selected: bool = True
    most_choices: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("recent_frames", self.recent_frames)
        least = self.sink_frames + self.recent_frames
        if self.budget_frames < least:
            raise ValueError(
                f"budget_frames is {self.budget_frames}; it counts sink and recent frames and must be at least {least}"
            )
        if self.most_choices < 0:
            raise ValueError(f"most_choices is {self.most_choices}; it must be at least 1, or 0 for no limit")

    def selection(self, chunk_frames: int) -> Selection:
        """A budget leaves chosen tokens and recent frames of the past beside the sink; the chunk is one of the recent."""
        staged = self.budget_frames - self.sink_frames - chunk_frames
        most = 0 if self.shift_selected else self.most_choices
        return Selection(
            staged, self.recent_frames - chunk_frames, self.shift_selected, chunk_frames if most else 0, most
        )

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if self.shift_selected:
            del described["most_choices"]
        return described

    @classmethod
    def described(cls, numbers: dict[str, Any]) -> AnchorDeep:
        before = {} if numbers.get("shift_selected", True) else {"most_choices": 0}
        return cls(**(before | numbers))

    def difference(self, theirs: dict[str, Any]) -> str:
        if theirs == self.describe() | {"most_choices": 0}:
            return (
                "an earlier version of the pack saved the state, which without shift_selected chose the same tokens again without "
                "limit and left the sink where it was; go on with that version, or begin a new video by the authors' rule"
            )
        return super().difference(theirs)

    def check(self, rollout: RolloutNumbers) -> None:
        if rollout.positions != "packed":
            raise ValueError(
                f"positions is {rollout.positions!r}, but the deep anchor puts sink, chosen tokens and recent frames side by "
                "side in time; choose 'packed'"
            )
        if rollout.cache_dtype != "model" or rollout.cache_device != "gpu":
            raise ValueError(
                f"cache_dtype is {rollout.cache_dtype!r} and cache_device {rollout.cache_device!r}, but the deep anchor chooses "
                "among cached tokens as they are; choose 'model' and 'gpu'"
            )
        others = {
            "absorption": rollout.absorption is not None,
            "chunks denoised together": rollout.blocks > 1,
            "layers": rollout.layers is not None,
        }
        if what := next((name for name, asked in others.items() if asked), None):
            raise ValueError(
                f"the deep anchor decides by itself what every layer caches and does not go with {what}; use another anchor"
            )
        if self.recent_frames < rollout.chunk_frames:
            raise ValueError(
                f"recent_frames is {self.recent_frames} and counts the chunk of {rollout.chunk_frames} latent frames; "
                f"it must be at least {rollout.chunk_frames}"
            )
        least = self.selection(rollout.chunk_frames).staged_frames
        if rollout.window_frames < least:
            raise ValueError(
                f"window_frames is {rollout.window_frames}, but the deep anchor's budget of {self.budget_frames} latent frames "
                f"needs at least {least} beside a sink of {self.sink_frames} and a chunk of {rollout.chunk_frames}"
            )


# every policy that is known, by its kind, and what tests roll out to hold it to the pack's promises
KINDS: dict[str, type[Anchor]] = {}
EXAMPLES: dict[str, tuple[Anchor, ...]] = {}


def register(policy: type[Anchor], *examples: Anchor) -> type[Anchor]:
    """Make a policy known by its `kind`: states, absorptions and the pack's own tests then find it.

    `examples` are instances for tests (default: the one with its default numbers). The same class may be registered again.
    ValueError for a class that is no frozen dataclass under Anchor, for a kind that is not a plain name, and for one that
    another class has.
    """
    name = getattr(policy, "__name__", repr(policy))
    if not (isinstance(policy, type) and issubclass(policy, Anchor) and _is_frozen(policy)):
        raise ValueError(f"{name} is no policy; it must be a frozen dataclass under Anchor")
    if not (isinstance(policy.kind, str) and policy.kind.isidentifier()):
        raise ValueError(f"{name} has the kind {policy.kind!r}; a kind is one plain name, such as first_and_last")
    taken = KINDS.get(policy.kind)
    if taken is not None and (taken.__module__, taken.__qualname__) != (policy.__module__, policy.__qualname__):
        raise ValueError(f"{name} has the kind {policy.kind!r}, which {taken.__name__} has; give it another kind")
    examples = examples or (policy(),)
    if any(one.takes_evicted and not one.relative_only for one in examples):
        raise ValueError(
            f"{name} takes what leaves the window, whose place in time is no longer its own; say relative_only"
        )
    EXAMPLES[policy.kind] = examples
    KINDS[policy.kind] = policy
    return policy


def _is_frozen(policy: type) -> bool:
    """Whether the class itself, not only what it is under, is a frozen dataclass."""
    return "__dataclass_params__" in vars(policy) and vars(policy)["__dataclass_params__"].frozen


for _policy in (Anchor, AnchorStatic, AnchorEMA, AnchorMemory, AnchorReplay, AnchorAdaptive, AnchorDeep):
    register(_policy)
OWN_KINDS = frozenset(KINDS)


def unknown_kind(kind: object) -> str:
    """Why there is no policy of a kind, in a sentence."""
    others = "" if not isinstance(kind, str) else ": install the pack that it comes from"
    return f"anchor kind {kind!r} is not known; known are {', '.join(KINDS)}{others}"


def anchor_from(description: dict[str, Any]) -> Anchor:
    """The policy that `describe` described; ValueError for an unknown kind."""
    numbers = dict(description)
    kind = numbers.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(unknown_kind(kind))
    return KINDS[kind].described(numbers)
