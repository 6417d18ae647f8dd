"""What a rollout is, before anything is allocated: the model's geometry, sizes, window, anchor, positions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .absorption.absorbed_phases import Absorbed, Standing
from .absorption.settings import AbsorptionSettings
from .absorption.solve import Solution
from .anchors import Anchor, anchor_from
from .attention.fused_blocks import PassForm
from .audio.driving import DrivingSound
from .cache.byte_plan import CACHE_DEVICES, CACHE_DTYPES, CachePlan, LayerSpec
from .cache.one_pass import OnePass, goes_with
from .cache.specs import describe_layer, described_alike, layer_spec, stored
from .geometry import ModelGeometry
from .history import CLEAN, HISTORIES, LAST_LEVEL, OWN_LEVEL, check_history
from .reference import LEAST_SIDE, ReferenceRule, reference_tokens
from .rollout_state import RolloutState
from .rope import POSITION_MODES
from .schedules.schedule import Schedule

# what states that do not mention it were made with
_NEUTRAL = {
    "blocks": 1, "restart_frames": 0, "overlap_frames": 0, "cache_dtype": "model", "shares_window": False, "remade": "",
    "history": CLEAN, "windows": 1, "reference": None,
}  # fmt: skip
# how a video of several chunks denoised together ends: as the system's own loop, or with the others still under way
ENDINGS = ("as published", "open")
# how the past of a chunk comes about: cached as the chunks before it left it, or made anew before it (remade.py)
REMADE = ("", "newest", "first")


@dataclass(frozen=True)
class RolloutSpec:
    """Everything that has to match for a rollout to go on; knows its cache's bytes before anything is allocated.

    `height` and `width` are in latent pixels; `model` identifies the weights; `layers` overrides the plan of single
    layers (default: the same for all); `absorption` lets some forget their history later on. `blocks` chunks are denoised
    together (Rolling Forcing); every `restart_frames` latent frames the video starts afresh over its last
    `overlap_frames` (CausVid; 0: never). `cache_dtype` is how anchor and window are stored, `cache_device` where; only the
    latter may change from run to run.

    `shares_window`: the blocks of a pass take their room from the window, as Rolling Forcing's do (schedules/rolling.py).
    `ending`, one of ENDINGS, may change from run to run: "as published" lets no block enter that begins beyond the length
    asked for, so that the window shrinks; in "open" all that are under way stay, and a shorter video is an exact prefix of
    a longer one.

    `one_pass_recache`: a recache is one pass over anchor, window and a chunk, as LongLive's (cache/one_pass.py), where the rollout
    allows for it. It may change from run to run.

    `remade`, one of REMADE: no cache outlives a chunk, and its past is made anew of the newest `window_frames` latents, or of the
    video's first one and the newest others (Krea Realtime; remade.py).

    `history`, one of HISTORIES, says which passes' keys are the past, and `windows` how many windows that takes (history.py).
    `reference`: every pass attends to the tokens of a picture, too (reference.py); None: there is none.
    """

    geometry: ModelGeometry
    batch: int
    height: int
    width: int
    chunk_frames: int
    window_frames: int
    anchor: Anchor
    positions: str
    dtype: torch.dtype
    model: str = ""
    layers: tuple[LayerSpec, ...] | None = None
    absorption: AbsorptionSettings | None = None
    blocks: int = 1
    restart_frames: int = 0
    overlap_frames: int = 0
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    shares_window: bool = False
    ending: str = "open"
    one_pass_recache: bool = False
    remade: str = ""
    history: str = CLEAN
    windows: int = 1
    reference: ReferenceRule | None = None

    def __post_init__(self) -> None:
        checks = {
            "batch": (self.batch, 1),
            "chunk_frames": (self.chunk_frames, 1),
            "window_frames": (self.window_frames, 0),
            "height": (self.height, 1),
            "width": (self.width, 1),
            "blocks": (self.blocks, 1),
        }
        for name, (value, least) in checks.items():
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.height % self.geometry.patch or self.width % self.geometry.patch:
            raise ValueError(
                f"the latent is {self.width}x{self.height}; both sides must be multiples of {self.geometry.patch}"
            )
        known = {
            "positions": POSITION_MODES,
            "cache_dtype": CACHE_DTYPES,
            "cache_device": CACHE_DEVICES,
            "ending": ENDINGS,
            "remade": REMADE,
            "history": HISTORIES,
        }
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(options)}")
        if self.positions == "absolute" and self.anchor.relative_only:
            raise ValueError(
                f"positions is 'absolute' with the {self.anchor.kind} anchor, whose slots stand for no single frame; "
                "choose 'packed' or 'fixed'"
            )
        self._check_schedule()
        check_history(self)
        if self.reference is not None:
            self._check_reference()
        self.anchor.check(self)

    def _check_schedule(self) -> None:
        """What several blocks at once and restarts ask for."""
        if self.blocks > 1 and self.anchor.state_frames:
            raise ValueError(
                f"{self.blocks} chunks denoised together have no single hidden state; use another anchor than the adaptive one"
            )
        if self.absorption is not None and self.absorption.switch == "memory" and self.cache_device != "gpu":
            raise ValueError(
                "switch when memory asks is about the device's memory, and the cache is in host memory; choose cache_device gpu, "
                "or switch after the warm-up"
            )
        if self.blocks > 1 and self.absorption is not None:
            raise ValueError(
                f"absorption does not go with {self.blocks} chunks denoised together; remove one of the two"
            )
        if self.absorption is not None:
            self.absorption.check_layers(self.geometry.layers)
        if self.shares_window:
            self._check_shared()
        if self.remade:
            self._check_remade()
        if self.restart_frames:
            if not 0 < self.overlap_frames < self.restart_frames:
                raise ValueError(
                    f"overlap_frames is {self.overlap_frames}; it must be above 0 and below restart_frames, {self.restart_frames}"
                )
            if self.positions == "absolute":
                raise ValueError("restarts count time from 0 again, so positions must be packed or fixed, not absolute")

    def _check_shared(self) -> None:
        """What blocks that take their room from the window ask for."""
        if self.blocks == 1 or self.restart_frames or self.layers is not None:
            raise ValueError(
                "chunks that share the window's room are several at once, never start afresh and have one cache layout in every "
                f"layer; blocks is {self.blocks}, restart_frames {self.restart_frames}"
            )
        if self.window_frames < self.room_shared:
            raise ValueError(
                f"window_frames is {self.window_frames}; {self.blocks} chunks that share its room need at least {self.room_shared}"
            )

    def _check_remade(self) -> None:
        """What a past that is made anew asks for."""
        others = {
            "chunks denoised together": self.blocks > 1,
            "restarts": self.restart_frames,
            f"the {self.anchor.kind} anchor": type(self.anchor) is not Anchor,
            "absorption": self.absorption is not None,
            "absolute positions": self.positions == "absolute",
        }
        if found := [name for name, there in others.items() if there]:
            raise ValueError(
                f"a past that is made anew before every chunk does not go with {' and '.join(found)}; remove one of the two"
            )

    def _check_reference(self) -> None:
        """What the tokens of a reference ask for."""
        stride = self.geometry.space.stride
        if min(self.height, self.width) < LEAST_SIDE:
            raise ValueError(
                f"the video is {stride * self.width}x{stride * self.height}, and with a reference both sides must be at least "
                f"{stride * LEAST_SIDE}"
            )
        if self.remade:
            raise ValueError(
                "a past that is made anew before every chunk does not go with a reference; remove one of the two"
            )

    def check_given(self) -> None:
        """ValueError, in a sentence, if a video by these rules cannot begin with given latent frames."""
        if self.history != CLEAN:
            raise ValueError(
                "start latents are cached by a clean pass, and the past of this rollout is what its noisy passes cached: give the "
                "picture as reference, or choose a preset with a clean history"
            )

    def check_inside(self, frames: int) -> None:
        """ValueError, in a sentence, if so many given latent frames cannot stand inside the first chunk (given.py)."""
        instead = "choose the start mode before the first chunk"
        others = {
            f"{self.blocks} chunks denoised together": self.blocks > 1,
            "a past that is made anew before every chunk": self.remade,
        }
        for name in (name for name, there in others.items() if there):
            raise ValueError(f"start latents inside the first chunk do not go with {name}; {instead}")
        if 0 < frames < self.chunk_frames:
            return
        pictures, most = self.geometry.space.pictures, self.chunk_frames - 1
        fit = (
            f"at most {pictures(most)} pictures ({most} latent frames) fit inside: give fewer, or {instead}"
            if most
            else f"none fits inside: {instead}"
        )
        raise ValueError(
            f"the start latents are {pictures(frames)} pictures ({frames} latent frames) and the first chunk has "
            f"{self.chunk_frames} latent frames, so {fit}"
        )

    @property
    def room_shared(self) -> int:
        """The smallest window that `shares_window` goes with: it and one chunk more have room for anchor and all blocks."""
        return self.anchor.frames + (self.blocks - 1) * self.chunk_frames

    def clip(self, frame: int) -> int:
        """Which clip a frame belongs to: 0, and one more after every restart."""
        if not self.restart_frames or frame < self.restart_frames:
            return 0
        return 1 + (frame - self.restart_frames) // (self.restart_frames - self.overlap_frames)

    @property
    def recent_frames(self) -> int:
        """Newest latents that a rollout holds on to, to commit them again under another prompt or after a restart."""
        return max(self.anchor.frames + self.window_frames + self.chunk_frames, self.overlap_frames)

    @property
    def recaches_at_once(self) -> bool:
        """Whether a recache is one pass: it is asked for, the anchor is a plain sink or none, and neither an absorption nor several
        chunks at once, clips or layers of their own ask for another cache."""
        plain = goes_with(self.anchor) and self.absorption is None and self.layers is None
        others = self.blocks > 1 or self.restart_frames or self.remade or self.history != CLEAN
        return self.one_pass_recache and plain and not others

    def one_pass(self, end: int) -> OnePass | None:
        """What a recache before the chunk from frame `end` on makes again in one pass; None: it goes chunk after chunk."""
        if not self.recaches_at_once:
            return None
        return OnePass.before(end, self.anchor.frames, self.window_frames, self.chunk_frames)

    @property
    def reference_tokens(self) -> int:
        """Tokens of the reference; 0 without one."""
        patch = self.geometry.patch
        return 0 if self.reference is None else reference_tokens(self.height // patch, self.width // patch)

    @property
    def first_kept(self) -> bool:
        """Whether the video's first latent frame is kept for later chunks."""
        return bool(self.remade) or (self.reference is not None and self.reference.rolls_at > 0)

    def kept_in(self, step: int, steps: int) -> int | None:
        """Into which of the windows, from 0, the keys of noisy pass `step` of so many go; None: into none."""
        if self.history == OWN_LEVEL:
            return step
        return 0 if self.history == LAST_LEVEL and step == steps - 1 else None

    @property
    def tokens(self) -> int:
        """Tokens a latent frame."""
        return (self.height // self.geometry.patch) * (self.width // self.geometry.patch)

    def made_frames(self, length: int) -> int:
        """The most content frames that are made for a video of `length` latent frames: the last chunk is always whole."""
        return length + self.chunk_frames - 1

    def pass_forms(self, inside: bool = False) -> tuple[PassForm, ...]:
        """The forms of the passes of every whole chunk: noisy ones, and the clean one. `inside`: of a first chunk too that given
        frames stand in, whose noisy passes have one timestep a frame."""
        states = self.anchor.state_frames
        noisy = self.blocks * self.chunk_frames + states
        timesteps = 1 if self.blocks == 1 else noisy
        forms = (
            PassForm(noisy, timesteps, kept=self.history == OWN_LEVEL),
            PassForm(self.chunk_frames + states, 1, kept=True),
        )
        return (*forms, PassForm(noisy, noisy, kept=False)) if inside else forms

    def plan(
        self,
        text_tokens: int = 0,
        vae_bytes: int = 0,
        length: int | None = None,
        solution: Solution | None = None,
        resumed: RolloutState | None = None,
        steps: int = 4,
        recaches: bool = False,
    ) -> CachePlan:
        """The cache plan; its `bytes()` is what a run will use.

        `length`: latent frames of the video; no window is larger than it (None: windows are whole). `solution`: an absorption that
        was solved before. `resumed`: the state that the run goes on from; a state of another rollout is not looked at.
        `steps`: noises that the steps of a chunk take. `recaches`: the prompt may change by a recache.
        """
        layer = layer_spec(self.anchor, self.window_frames, self.chunk_frames, self.positions, self.shares_window)
        plan = CachePlan(
            batch=self.batch,
            tokens=self.tokens,
            width=self.geometry.heads * self.geometry.head_dim,
            state_frames=self.anchor.state_frames,
            chunk_frames=self.chunk_frames * self.blocks,
            dtype=self.dtype,
            layers=self.layers or (layer,) * self.geometry.layers,
            text_tokens=text_tokens,
            vae_bytes=vae_bytes,
            heads=self.geometry.heads,
            cache_dtype=self.cache_dtype,
            cache_device=self.cache_device,
            latent_frame_bytes=4 * self.batch * self.geometry.channels * self.height * self.width,
            steps=steps,
            holds_state=self.blocks > 1 and self.ending != "open",
            one_pass_frames=self._most_in_one_pass(length) if recaches else 0,
            windows=self.windows,
            reference_tokens=self.reference_tokens,
        )
        if plan.expands:  # what is stored is raw itself
            plan = replace(plan, layers=tuple(stored(one) for one in plan.layers))
        if resumed is not None and self.differences(resumed.spec):
            resumed = None
        made = 0 if resumed is None else resumed.next_frame
        if length is not None:
            plan = replace(plan, frames=max(self.made_frames(length), made))
        if self.absorption is None:
            return plan
        chosen = None if solution is None else solution.chosen
        standing = None if resumed is None else Standing.of(resumed.absorption, len(plan.layers))
        absorbed = Absorbed(self.absorption, self.anchor, self.chunk_frames)
        return replace(plan, phases=absorbed.phases(plan, chosen, standing, made))

    def _most_in_one_pass(self, length: int | None) -> int:
        """The most frames that one pass of a recache has in a video of `length` latent frames (None: of any length)."""
        if not self.recaches_at_once:
            return 0
        return self.recent_frames if length is None else min(self.recent_frames, length)

    def describe(self) -> dict[str, Any]:
        """What has to match, by name, JSON-able; and how the video ends. What states of before do not name is left out where
        it is as theirs."""
        later = {"shares_window": True} if self.shares_window else {}
        later |= {} if self.ending == "open" else {"ending": self.ending}
        later |= {"remade": self.remade} if self.remade else {}
        later |= {} if self.history == CLEAN else {"history": self.history, "windows": self.windows}
        later |= {} if self.reference is None else {"reference": self.reference.describe()}
        return later | {
            "model": self.model,
            "geometry": self.geometry.describe(),
            "batch": self.batch,
            "height": self.height,
            "width": self.width,
            "chunk_frames": self.chunk_frames,
            "window_frames": self.window_frames,
            "anchor": self.anchor.describe(),
            "positions": self.positions,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": None if self.layers is None else [describe_layer(layer) for layer in self.layers],
            "absorption": None if self.absorption is None else self.absorption.describe(),
            "blocks": self.blocks,
            "restart_frames": self.restart_frames,
            "overlap_frames": self.overlap_frames,
            "cache_dtype": self.cache_dtype,
        }

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a state's description differs from this spec, a phrase each; empty if it can go on."""
        mine, stride = _NEUTRAL | self.describe(), self.geometry.space.stride
        mine.pop("ending", None)
        other = _NEUTRAL | other
        try:
            other["anchor"] = anchor_from(other["anchor"]).describe()
        except (KeyError, TypeError, ValueError):
            pass  # then it differs, and is told as it stands
        try:
            other["layers"] = other["layers"] and [described_alike(one) for one in other["layers"]]
        except (KeyError, TypeError):
            pass
        phrases = []
        for name, value in mine.items():
            theirs = other.get(name)
            if theirs == value:
                continue
            if name == "model":
                phrases.append("model is another checkpoint, or the same one loaded in another weight dtype")
            elif name == "shares_window":
                phrases.append(
                    f"the chunks under way {'do not ' if value else ''}share the window's room in the state and "
                    f"{'' if value else 'do not '}here"
                )
            elif name == "remade":
                phrases.append(f"{_made(theirs)} in the state, and {_made(value)} here")
            elif name == "reference" and (value is None or theirs is None):
                has, have = ("no" if one is None else "a" for one in (theirs, value))
                phrases.append(f"there is {has} reference in the state and {have} reference here")
            elif name == "anchor":
                phrases.append(self.anchor.difference(theirs))
            elif name in ("width", "height") and isinstance(theirs, int):
                phrases.append(f"{name} is {stride * theirs} in the state and {stride * value} here")
            else:
                phrases.append(f"{name} is {theirs} in the state and {value} here")
        return phrases


def _made(remade: object) -> str:
    """What is said of a `remade` from any file."""
    words = {
        "": "the past is cached from chunk to chunk",
        "newest": "the past is made anew before every chunk",
        "first": "the past is made anew before every chunk and begins with the first frame",
    }
    return words.get(str(remade), f"the past is {remade!r:.40}")


@dataclass(frozen=True)
class Settings:
    """What may change from run to run: the seed, the schedule, and whose noise generated frames start from.

    `first_noise` [B, C, T, h, w] float32 on the CPU: the content's noise at the first step, counted from the first
    generated frame; None, and frames beyond its end, mean the seed's. The state and later steps have the seed's.
    """

    seed: int
    schedule: Schedule
    first_noise: torch.Tensor | None = field(default=None, compare=False, repr=False)
    sound: DrivingSound | None = field(default=None, compare=False, repr=False)
