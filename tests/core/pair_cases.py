"""The features of a rollout that meet: every allowed pair of their values in few combinations, and what each stands for."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

import torch
from faults import combinations as injected
from faults.combinations import ADAPTIVE, BLOCKS, FRAMES, SPEAKS, WINDOW, Combination
from faults.pairs import Value, pairwise
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.given import BEFORE, INSIDE
from adastate_core.history import LAST_LEVEL, OWN_LEVEL
from adastate_core.prompts.plan import PromptPlan
from adastate_core.rollout import RolloutSpec

SEED, QUICK = 0, 8
# a restart is a dimension of its own here
TRANSITIONS = tuple(one for one in injected.DIMENSIONS["transition"] if one != "restart")
GIVEN, AFTER = 4, 3  # start latents, no multiple of FRAMES; chunks from the one of the transition on
WITHIN = "inside the first chunk"  # where FRAMES - 1 of them stand
HOST = "host memory"
GOES, COMES = f"gpu, then {HOST}", f"{HOST}, then gpu"
AMONG = "among the given frames"
DIMENSIONS = {
    "anchor": injected.DIMENSIONS["anchor"],
    "storage": ("model", "fp8", "int8"),
    "device": ("gpu", HOST, GOES, COMES),
    "absorption": ("none", "warming", "switching", "switched"),
    "transition": TRANSITIONS,
    "restart": ("off", "on"),
    "blocks": injected.DIMENSIONS["blocks"],
    "given": ("none", "some", WITHIN),
    "talks": ("none", SPEAKS, OWN_LEVEL, LAST_LEVEL),
    "batch": ("1", "2"),
    "resume": ("in process", "from a file"),
    "latents": ("let go", "kept"),
    "interrupt": ("none", "in a chunk", "in the transition", AMONG),
}
# a part of each side that a refusal has to name
WORDS = {
    "deep": "deep anchor", "fp8": "fp8", "int8": "int8", HOST: HOST, GOES: HOST, COMES: HOST, "warming": "absorption",
    "switching": "absorption", "switched": "absorption", "several": "chunks denoised together", "adaptive": "adaptive",
    "recache": "recache", OWN_LEVEL: OWN_LEVEL, LAST_LEVEL: LAST_LEVEL,
    "changed adaptive": "adaptive", WITHIN: "inside the first chunk", "shot": "a shot", "on": "restarts",
}  # fmt: skip
# read as they are; every other value is named with its dimension
_CLEAR = {*WORDS, *TRANSITIONS, *DIMENSIONS["resume"]} - {"none", "on"}


def refused(a: Value, b: Value) -> bool:
    """Whether a spec takes no rollout with both values."""
    pair = dict((a, b))
    absorbs = pair.get("absorption", "none") != "none"
    several = pair.get("blocks") == "several"
    if pair.get("talks") in (OWN_LEVEL, LAST_LEVEL):
        unclean = several or pair.get("anchor") in ADAPTIVE or pair.get("restart") == "on"
        return unclean or pair.get("transition") == "recache" or (absorbs and pair["talks"] == OWN_LEVEL)
    if pair.get("transition") == "shot" and (several or pair.get("anchor") == "deep" or pair.get("restart") == "on"):
        return True
    if pair.get("anchor") == "deep":
        return pair.get("storage", "model") != "model" or pair.get("device", "gpu") != "gpu" or absorbs or several
    return several and (absorbs or pair.get("anchor") in ADAPTIVE)


def excluded(a: Value, b: Value) -> bool:
    """Those, what the rollout refuses when it is given frames, and pairs that mean nothing: an interrupt among passes that are not
    there."""
    unclean = any(("talks", one) in (a, b) for one in (OWN_LEVEL, LAST_LEVEL))
    if unclean and any(one[0] == "given" and one[1] != "none" or one[1] == AMONG for one in (a, b)):
        return True
    nothing = any({a, b} == {("given", one), ("interrupt", AMONG)} for one in ("none", WITHIN))
    return refused(a, b) or nothing or {a, b} == {("given", WITHIN), ("blocks", "several")}


@dataclass(frozen=True)
class Pair(Combination):
    """One value of each dimension. What a value leaves open (where exactly it is cut) is drawn from its name."""

    absorption: str = "none"
    device: str = "gpu"
    restart: str = "off"
    given: str = "none"
    talks: str = "none"
    batch: str = "1"
    resume: str = "in process"
    latents: str = "let go"
    interrupt: str = "none"

    @property
    def name(self) -> str:
        values = [(name, getattr(self, name)) for name in DIMENSIONS]
        return ", ".join(value if value in _CLEAR else f"{name} {value}" for name, value in values)

    def luck(self, what: str) -> random.Random:
        """A source of numbers of its own for each `what`."""
        return random.Random(f"{SEED}/{self.name}/{what}")

    @property
    def start(self) -> int:
        """The first latent frame of the chunk with which the prompt changes."""
        return self.chunk * FRAMES + (GIVEN if self.given == "some" else 0)

    @property
    def length(self) -> int:
        return self.start + AFTER * FRAMES

    def devices(self) -> tuple[str, str]:
        """Where the cache is before the first resume, and from it on."""
        first, _, then = self.device.partition(", then ")
        return first, then or first

    def cuts(self) -> list[int]:
        """Two numbers of latents after which the run ends and is gone on with: one at the transition's chunk (before it,
        or within what it gave), and one anywhere else."""
        luck = self.luck("cuts")
        here = self.start + luck.choice((0, 0, 1))
        return sorted((here, luck.choice([n for n in range(1, self.length) if n != here])))

    def absorbed(self) -> AbsorptionSettings | None:
        """Warming: it collects in the transition's chunk and switches in the next one. Switching: it does so with the last
        write before that chunk, or with the chunk. Switched: by then it is measured and solved anew."""
        if self.absorption == "none":
            return None
        luck = self.luck("absorption")
        more = (
            {} if self.absorption != "switched" else dict(refresh=luck.choice(("always", "always", "drift")), drift=0.5)
        )
        return AbsorptionSettings(
            ratio=luck.choice((0.5, 1.0)), local_window_frames=2, sink_frames=1, ridge=0.3, monitor_layers=-1,
            monitor_chunks=2, scope=luck.choice(("head", "layer")),
            # the passes of a choice are counted like a chunk's, in which an interrupt is to come
            select="sensitivity" if self.interrupt == "none" else "residual",
            warmup_frames={
                "warming": self.start + FRAMES + 1,
                "switching": self.start + luck.choice((0, 1)),
                "switched": self.start - FRAMES,
            }[self.absorption],
            **more,
        )  # fmt: skip

    def spec(self, model: TinyModel, device: str = "") -> RolloutSpec:
        """With the cache on `device`, by default the one that it has last. ValueError where the values do not go together."""
        luck = self.luck("spec")
        restart = {}
        if self.restart == "on":  # with the transition, or a chunk from it
            restart = dict(
                restart_frames=self.start + luck.choice((0, 0, -FRAMES, FRAMES)), overlap_frames=luck.choice((2, 4))
            )
        spec = RolloutSpec(
            geometry=model.geometry, batch=int(self.batch), height=self.size[0], width=self.size[1],
            chunk_frames=FRAMES,
            anchor=self.policy(), **self.windows(WINDOW, may_share=not restart),
            positions=(not restart and self.places())
            or ("packed" if self.anchor == "deep" else luck.choice(("packed", "packed", "fixed"))),
            dtype=torch.float32, absorption=self.absorbed(), blocks=BLOCKS if self.blocks == "several" else 1,
            cache_dtype=self.storage, cache_device=device or self.devices()[1], **restart,
            **self.talking(),
        )  # fmt: skip
        self.check_plan(spec)
        return spec

    def prompts(self) -> PromptPlan | None:
        return self.changes(self.start)

    @property
    def items(self) -> int:
        return int(self.batch)

    def start_latents(self, model: TinyModel) -> torch.Tensor | None:
        if self.given == "none":
            return None
        shape = (int(self.batch), model.geometry.channels, GIVEN if self.given == "some" else FRAMES - 1, *self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(3))

    @property
    def stands(self) -> str:
        """Where start latents do, one of given.STARTS."""
        return INSIDE if self.given == WITHIN else BEFORE


@functools.cache
def cases() -> tuple[Pair, ...]:
    """Every pair of values that is not excluded, in as few as a greedy choice finds, and some of three values that showed
    something together; in a random order."""
    found = [Pair(**values) for values in pairwise(DIMENSIONS, excluded, SEED)]
    found += [Pair("static", "model", device=GOES, transition="flush", resume="from a file", given="some")]
    found += [
        Pair(anchor, storage, "switched", transition, resume="from a file", restart=restart, interrupt="in a chunk")
        for anchor, storage, transition, restart in (
            ("adaptive", "model", "recache", "off"),
            ("ema", "int8", "flush", "off"),
            ("changed adaptive", "model", "none", "on"),
        )
    ]
    return tuple(sample(SEED, len(found), found))


def sample(seed: int, n: int, of: list[Pair] | None = None) -> list[Pair]:
    """`n` of the combinations, drawn by `seed`."""
    return random.Random(seed).sample(list(cases() if of is None else of), n)


def values() -> list[Value]:
    return [(name, value) for name, options in DIMENSIONS.items() for value in options]


def refusals() -> list[tuple[Pair, tuple[str, str]]]:
    """Every pair of values that is refused, alone, and the two values."""
    pairs = [(a, b) for a, b in itertools.combinations(values(), 2) if a[0] != b[0] and refused(a, b)]
    return [(Pair(**dict(pair)), (pair[0][1], pair[1][1])) for pair in pairs]
