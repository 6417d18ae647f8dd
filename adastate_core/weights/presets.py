"""The public causal systems on Wan 2.1, as settings of this pack's rollout.

Each is what that system's own inference does, by its published code: step list, chunk, window, anchor, positions. In
their words local_attn_size = anchor + window + chunk. Numbers are defaults: what a user or a file says wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from ..anchors import Anchor, AnchorDeep, AnchorEMA, AnchorMemory, AnchorReplay, AnchorStatic
from ..schedules.schedule import Schedule

FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
# latent frames of the clips that the Wan 2.1 family was distilled on (81 pictures)
TRAINED_FRAMES = 21


@dataclass(frozen=True)
class Preset:
    """One system. `timesteps` are unshifted, of 1000; `first_timesteps` those of the first chunk where it has its own.

    `blocks` chunks are denoised together at rising noise (Rolling Forcing; 1 elsewhere). Every `restart_frames` latent
    frames the cache is emptied and the last `overlap_frames` are put back first (CausVid; 0: never). `longer` says what
    to use beyond `trained_frames`, and is empty where the system is made for any length. `names` are regular expressions,
    one of which is found in the lower-case path of a file with such weights; `sampler` is one of schedule.SAMPLERS.
    """

    name: str
    title: str
    source: str
    timesteps: tuple[float, ...] = FOUR_STEPS
    first_timesteps: tuple[float, ...] = ()
    shift: float = 5.0
    warp: bool = True
    chunk_frames: int = 3
    window_frames: int = 18
    positions: str = "absolute"
    anchor: Anchor = field(default_factory=Anchor)
    blocks: int = 1
    restart_frames: int = 0
    overlap_frames: int = 0
    trained_frames: int = TRAINED_FRAMES
    longer: str = ""
    files: tuple[str, ...] = ()
    note: str = ""
    names: tuple[str, ...] = ()
    sampler: str = "renoising"

    @property
    def schedule(self) -> Schedule:
        """The steps; a list that is not to be warped is meant as sigmas of 1000."""
        if self.warp:
            schedule = Schedule.warped(self.timesteps, self.shift, self.first_timesteps)
        else:
            schedule = Schedule(tuple(t / 1000 for t in self.timesteps))
        return replace(schedule, sampler=self.sampler)

    def settings(self) -> dict[str, Any]:
        """What `auto` inputs of a rollout follow, JSON-able."""
        return {
            "steps": len(self.timesteps),
            "shift": self.shift,
            "chunk_frames": self.chunk_frames,
            "window_frames": self.window_frames,
            "positions": self.positions,
            "preset": self.name,
        }

    def describe(self) -> str:
        """A few lines for people."""
        sigmas = ", ".join(f"{sigma:.4g}" for sigma in self.schedule.sigmas)
        lines = [
            f"{self.title} ({self.source})",
            f"noise levels {sigmas}; {self.chunk_frames} latent frames a chunk; window {self.window_frames}; "
            f"anchor {self.anchor.kind} ({self.anchor.frames} frames); {self.positions} positions",
        ]
        if self.first_timesteps:
            first = ", ".join(f"{sigma:.4g}" for sigma in self.schedule.first_sigmas)
            lines.append(f"the first chunk has noise levels {first}")
        if self.sampler != "renoising":
            lines.append(f"between its steps it uses the sampler {self.sampler}")
        if self.blocks > 1:
            lines.append(f"{self.blocks} chunks are denoised together at rising noise")
        if self.restart_frames:
            lines.append(f"starts afresh every {self.restart_frames} latent frames over {self.overlap_frames} old ones")
        return "\n".join([*lines, *([self.note] if self.note else []), *([self.longer] if self.longer else [])])


_ROLLS = "for more than 81 frames use the preset infinity_rope, memrope or reward_forcing, or another anchor"
_SELF = dict(files=("self_forcing_dmd.pt",), longer=_ROLLS)
_FRAMEWISE = dict(chunk_frames=1, window_frames=20, longer=_ROLLS)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("self_forcing", "Self-Forcing", "arXiv 2506.08009", names=(r"self.?forcing",), **_SELF),
        Preset(
            "causal_forcing", "Causal-Forcing, chunk-wise", "arXiv 2602.02214", names=(r"causal.?forcing|chunk.?wise",),
            files=("chunkwise/causal_forcing.pt",), longer=_ROLLS,
        ),
        Preset(
            "causal_forcing_frame", "Causal-Forcing, frame-wise", "arXiv 2602.02214", names=(r"frame.?wise",),
            files=("framewise/causal_forcing.pt",), **_FRAMEWISE,
        ),
        Preset(
            "causal_forcing_frame_2step", "Causal-Forcing++, frame-wise, 2 steps", "arXiv 2605.15141",
            names=(r"framewise.?2.?step|frame.?wise.*2step",),
            timesteps=(1000.0, 500.0), first_timesteps=FOUR_STEPS, files=("framewise-2step.pt",), **_FRAMEWISE,
        ),
        Preset(
            "causal_forcing_frame_1step", "Causal-Forcing++, frame-wise, 1 step", "arXiv 2605.15141",
            names=(r"framewise.?1.?step|frame.?wise.*1step",),
            timesteps=(1000.0,), first_timesteps=FOUR_STEPS, files=("framewise-1step.pt",), **_FRAMEWISE,
        ),
        Preset(
            "causvid", "CausVid, 3 steps with overlap", "arXiv 2412.07772", names=(r"caus.?vid",),
            timesteps=(1000.0, 757.0, 522.0), warp=False, shift=8.0, positions="packed", restart_frames=21, overlap_frames=3,
            note="at a restart CausVid decodes and encodes the first overlapping picture again; here latents stay latents",
        ),
        Preset(
            "longlive", "LongLive", "arXiv 2509.22622", names=(r"long.?live",),
            window_frames=6, anchor=AnchorStatic(3), files=("longlive_base.pt", "lora.pt"), trained_frames=240,
            note="longlive_base.pt wants its LoRA (rank 256): put Load Causal LoRA between the loader and the rollout",
        ),
        Preset(
            "rolling_forcing", "Rolling Forcing", "arXiv 2509.25161", names=(r"rolling.?forcing|longvideo",),
            timesteps=(1000.0, 800.0, 600.0, 400.0, 200.0), window_frames=3, positions="packed",
            anchor=AnchorStatic(3), blocks=5, files=("rolling_forcing_dmd.pt", "chunkwise/longvideo.pt"),
            note="its own clean pass sees 18 past frames and no anchor; here it sees what the noisy pass sees",
        ),
        Preset(
            "reward_forcing", "Reward Forcing", "arXiv 2512.04678", names=(r"reward.?forcing",),
            window_frames=3, positions="packed", anchor=AnchorEMA(3, 0.999),
        ),
        Preset(
            "infinity_rope", "Infinity-RoPE, on Self-Forcing weights", "arXiv 2511.20649", names=(r"infinity.?rope",),
            window_frames=2, positions="packed", anchor=AnchorStatic(1),
        ),
        Preset(
            "memrope", "MemRoPE, on Self-Forcing or LongLive weights", "Kim et al. 2026", names=(r"memrope",),
            window_frames=4, positions="packed", anchor=AnchorMemory(3),
            note="its own memories begin a chunk later: until then two more frames stay in their place",
        ),
        Preset(
            "rolling_sink", "Rolling Sink, on Self-Forcing weights", "arXiv 2602.07775", names=(r"rolling.?sink",),
            anchor=AnchorReplay(21),
        ),
        Preset(
            "deep_forcing", "Deep Forcing, on Self-Forcing weights", "arXiv 2512.05081", names=(r"deep.?forcing|deep.?sink",),
            window_frames=8, positions="packed", anchor=AnchorDeep(),
            note="chosen tokens are moved in time, as in the paper; the authors' code leaves them: shift_selected off",
        ),
        Preset(
            "krea_14b", "Krea Realtime 14B", "its model card", names=(r"krea",),
            note="14 B: plan the cache first (1.19 GiB a latent frame at 832x480 in bf16)", longer=_ROLLS,
        ),
    )
}  # fmt: skip
OWN_PRESETS = tuple(PRESETS)


def register_preset(one: Preset) -> Preset:
    """Make a system known by its name: Load Causal Video Model and Model Preset then list it. It may be registered again.

    ValueError for a name that is no plain one or is one of the pack's own, and for names of files that are no patterns.
    """
    if not (isinstance(one, Preset) and re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", one.name)):
        raise ValueError(f"{one!r:.80} is no preset with a name of letters, digits, dots, dashes and underscores")
    if one.name in OWN_PRESETS or one.name in ("auto", "none"):
        raise ValueError(f"the preset {one.name} is the pack's own; give yours another name")
    for pattern in one.names:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the preset {one.name} looks for {pattern!r}, which is no pattern ({error})") from error
    one.schedule  # noqa: B018  raises for steps that are none
    PRESETS[one.name] = one
    return one


def preset(name: str) -> Preset:
    """The preset of that name; ValueError naming those there are."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; known are {', '.join(PRESETS)}")
    return PRESETS[name]


# those whose names are looked for in a file's path, most telling first: a name of one may hold that of another
_TELLING = (
    "krea_14b",
    "causal_forcing_frame_1step",
    "causal_forcing_frame_2step",
    "causal_forcing_frame",
    "rolling_forcing",
    "reward_forcing",
    "rolling_sink",
    "deep_forcing",
    "infinity_rope",
    "memrope",
    "longlive",
    "causal_forcing",
    "causvid",
    "self_forcing",
)


def recognised(path: str, part: str = "") -> str:
    """The preset that a file's name (with its folder) and the model taken out of it speak for; empty if none does.

    The systems share one architecture, so their weights cannot be told apart: a trainer's file with a generator in it
    (`part`) is taken for Self-Forcing's kin.
    """
    others = [name for name in PRESETS if name not in _TELLING]
    for name in (*others, *_TELLING):
        if any(re.search(pattern, path.lower()) for pattern in PRESETS[name].names):
            return name
    return "self_forcing" if part.startswith("generator") else ""
