"""The public causal systems on Wan, as settings of this pack's rollout.

Each is that system's step list, chunk, window, anchor and positions; `compared_chunks` says over how many chunks a rollout by it is
compared with a loop that is written from the published code (docs/systems.md), and the note says where it differs. In their words
local_attn_size = anchor + window + chunk. Numbers are defaults: what a user or a file says wins.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from ..anchors import Anchor, AnchorAdaptive, AnchorDeep, AnchorEMA, AnchorMemory, AnchorReplay, AnchorStatic
from ..audio.driving import CHUNK, HOST
from ..cache.one_pass import goes_with
from ..geometry import WAN21, WAN22, LatentSpace
from ..given import BEFORE, INSIDE
from ..history import CLEAN, LAST_LEVEL, OWN_LEVEL
from ..schedules.schedule import TIMESTEPS, Schedule
from ..schedules.solvers import RENOISING

FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
# latent frames of the clips that the Wan 2.1 family was distilled on (81 pictures)
TRAINED_FRAMES = 21


@dataclass(frozen=True)
class Preset:
    """One system. `timesteps` are unshifted, of 1000; `first_timesteps` those of the first chunk where it has its own. Without
    `warp` they are what the model is told, at the noise `levels` (empty: timesteps / 1000).

    `blocks` chunks are denoised together at rising noise (Rolling Forcing; 1 elsewhere). Every `restart_frames` latent
    frames the cache is emptied and the last `overlap_frames` are put back first (CausVid; 0: never). `longer` says what
    to use beyond `trained_frames`, and is empty where the system is made for any length; `longer_positions` are the positions with
    which it is made for any. `names` are regular expressions, one of which is found in the lower-case path of a file with such
    weights of its space; `sampler` is one of solvers.SAMPLERS.
    `shares_window`: the blocks take their room from the window, which shrinks with them at the end of the video unless
    another ending is asked for (spec.RolloutSpec).
    `one_pass_recache`: a recache is one pass over all that is made again, not one a chunk (spec.RolloutSpec).
    `remade`, one of spec.REMADE: no cache outlives a chunk. `cached` is then the system with a past that is cached from chunk to
    chunk, for what does not go with the other: an anchor or absorption of one's own, absolute positions, a state of before.
    `fps`: frames a second that its weights make (0: its latent space's). `start`: where given latents stand if nobody says it,
    "before" the first chunk or "inside" it. `space` is the latent space of its weights; its rules go with others.
    `compared_chunks`: over so many the pack's tests compare it with the system's published loop.
    `driven_by_sound`: its weights hear a sound and are shown a reference. `history`, one of HISTORIES, says what a chunk's past is,
    `audio`, one of ALIGNMENTS, what it hears, and from chunk `reference_rolls` (a latent frame; 0: never) on the first frame stands
    for the reference. `lora_scale`: what a LoRA of it that says no alpha is applied with.
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
    longer_positions: str = ""
    files: tuple[str, ...] = ()
    note: str = ""
    names: tuple[str, ...] = ()
    sampler: str = RENOISING
    shares_window: bool = False
    one_pass_recache: bool = False
    levels: tuple[float, ...] = ()
    compared_chunks: int = 0
    remade: str = ""
    cached: Preset | None = None
    fps: float = 0.0
    start: str = BEFORE
    space: LatentSpace = WAN21
    driven_by_sound: bool = False
    history: str = CLEAN
    audio: str = HOST
    reference_rolls: int = 0
    lora_scale: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The steps; a list that is not to be warped is what the model is told."""
        if self.warp:
            schedule = Schedule.warped(self.timesteps, self.shift, self.first_timesteps)
        elif self.levels:
            schedule = Schedule(self.levels, told=self.timesteps)
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

    def check_sampler(self, sampler: str) -> None:
        """ValueError for a sampler that does not go with its rules."""
        if self.blocks > 1 and sampler != RENOISING:
            raise ValueError(
                f"the sampler is {sampler}, and {self.title} denoises chunks together, which only {RENOISING} does: set sampler to "
                "auto in Model Preset, or choose another preset"
            )

    def describe(
        self,
        ending: str = "as published",
        keep_first_frame: bool = False,
        sampler: str = "",
        space: LatentSpace | None = None,
    ) -> str:
        """A few lines for people; `ending` is one of spec.ENDINGS, `keep_first_frame` for a past that is made anew, `sampler` one
        that is used in the place of its own, and `space` that of the model which is to follow it."""
        sampler = sampler or self.sampler
        sigmas = ", ".join(f"{sigma:.4g}" for sigma in self.schedule.sigmas)
        lines = [
            f"{self.title} ({self.source})",
            f"noise levels {sigmas}; {self.chunk_frames} latent frames a chunk; window {self.window_frames}; "
            f"anchor {self.anchor.kind} ({self.anchor.frames} frames); {self.positions} positions",
        ]
        if self.schedule.told:
            told = ", ".join(f"{timestep:.4g}" for timestep in self.schedule.told)
            lines.append(f"the model is told the timesteps {told}")
        if self.first_timesteps:
            first = ", ".join(f"{sigma:.4g}" for sigma in self.schedule.first_sigmas)
            lines.append(f"the first chunk has noise levels {first}")
        if sampler != RENOISING or self.sampler != sampler:
            instead = f", and not its own {self.sampler}" if self.sampler != sampler else ""
            lines.append(f"between its steps it uses the sampler {sampler}{instead}")
        if (space or WAN21) != self.space:
            model = f", and those of this model in that of {space.name} ({space.channels})" if space else ""
            lines.append(
                f"its weights work in the latent space of {self.space.name} ({self.space.channels} channels){model}"
            )
        if self.start == INSIDE:
            lines.append("pictures to start from stand inside the first chunk")
        if self.blocks > 1:
            lines.append(f"{self.blocks} chunks are denoised together at rising noise")
        if self.shares_window:
            room = self.window_frames + self.chunk_frames
            past = max(0, room - self.anchor.frames - self.blocks * self.chunk_frames)
            end = "they stay under way" if ending == "open" else "no chunk enters, and the window shrinks"
            lines.append(
                f"a pass has room for {room} frames: the anchor, the newest {past} past ones and those under way; the clean pass "
                f"reads the newest {self.window_frames}. At the end of the video {end}"
            )
        if self.restart_frames:
            lines.append(f"starts afresh every {self.restart_frames} latent frames over {self.overlap_frames} old ones")
        if self.one_pass_recache and goes_with(self.anchor):
            later = self.window_frames + self.chunk_frames
            lines.append(
                f"a recache is one pass over frames that all see each other: over all, the anchor's among them, while there are no "
                f"more than {self.anchor.frames + later}, and over the newest {later} afterwards"
            )
        if self.driven_by_sound:
            lines += self._sound_words()
        if self.remade:
            lines.append(self._remade_words("first" if keep_first_frame else self.remade))
        if self.compared_chunks:
            lines.append(f"equal to its published loop within 1e-4 over {self.compared_chunks} chunks")
        return "\n".join([*lines, *([self.note] if self.note else []), *([self.longer] if self.longer else [])])

    def _sound_words(self) -> list[str]:
        """What it hears and is shown, and whose keys are its past."""
        past = {
            CLEAN: "the past is what a clean pass over each finished chunk cached",
            OWN_LEVEL: "each step has a window of its own, of what that step cached at its noise level; there is no clean pass",
            LAST_LEVEL: "all steps share one window, of what the last step cached; there is no clean pass",
        }[self.history]
        hears = "its own pictures' sound alone" if self.audio == CHUNK else "its own sound and that just before it"
        rolls = (
            f"; from latent frame {self.reference_rolls} on the video's first frame stands for the reference"
            if self.reference_rolls
            else ""
        )
        return [past, f"it is driven by sound and shows a reference picture: a chunk hears {hears}{rolls}"]

    def _remade_words(self, remade: str) -> str:
        """How the past comes about that is made anew."""
        past = f"before every chunk but the first the network passes {self.window_frames} past frames once, alone and clean"
        if remade == "first":
            frames = f"the video's first and its newest {self.window_frames - 1}"
        else:
            frames = (
                "the newest, the oldest of which is encoded anew from the third chunk on: its last picture, alone, if the "
                "rollout's stream has a full VAE; without one its latent is taken"
            )
        return f"no cache outlives a chunk: {past}; no clean pass follows a chunk. The past frames are {frames}"


_ROLLS = "for more than 81 frames use the preset infinity_rope, memrope or reward_forcing, or another anchor"
# the levels of a table of 1000 at shift 8 that lie nearest to CausVid's timesteps
_CAUSVID_LEVELS = Schedule.warped((1000.0, 280.0, 120.0), 8.0).sigmas
_SELF = dict(files=("self_forcing_dmd.pt",), longer=_ROLLS, compared_chunks=12)
_FRAMEWISE = dict(chunk_frames=1, window_frames=20, longer=_ROLLS, compared_chunks=30)
# the last pass is told 0 and takes off the last noise level of a table of 1000
_KREA_TOLD = (1000.0, 937.5, 2500 / 3, 625.0, 0.0)
_KREA_LEVELS = (*Schedule.warped(FOUR_STEPS, 5.0).sigmas, 0.005 / 1.004)
_KREA = dict(name="krea_14b", title="Krea Realtime 14B", source="krea-ai/realtime-video", names=(r"krea",))
# every chunk has the same positions, the first one included (the project page's "same positional structure")
_STATE = dict(window_frames=3, positions="fixed", anchor=AnchorAdaptive(1))

_LONGLIVE2_SOURCE = "arXiv 2605.18739"
# trained on clips of 96 latent frames and distilled on rollouts of 32; the published commands make 128 and 384
_LONGLIVE2 = dict(
    chunk_frames=8, window_frames=16, anchor=AnchorStatic(8), sampler="unipc", trained_frames=96, fps=24.0, start=INSIDE,
    space=WAN22, compared_chunks=12, longer_positions="packed",
    longer="for videos without an end set positions to packed, its use_relative_rope; at absolute ones its own command, whose "
    "table has 1024 of them, ends after 4093 pictures, and this rollout goes on",
)  # fmt: skip


def _flow_unipc(steps: int) -> dict[str, Any]:
    """What LongLive 2.0's scheduler makes of so many steps: even ones from the noisiest of its 1000 training levels down, shifted
    by 5; the levels in float32, and whole timesteps for the model (FlowUniPCMultistepScheduler.set_timesteps)."""
    levels = [_float32(1 - 1 / TIMESTEPS) * (1 - step / steps) for step in range(steps)]
    shifted = [5 * level / (1 + 4 * level) for level in levels]
    told = tuple(float(int(TIMESTEPS * level)) for level in shifted)
    return dict(timesteps=told, warp=False, levels=tuple(map(_float32, shifted)))


def _float32(number: float) -> float:
    """The nearest number that a float32 holds."""
    return struct.unpack("f", struct.pack("f", number))[0]


_LIVEAVATAR = dict(
    window_frames=9, sampler="euler", fps=25.0, driven_by_sound=True, history=OWN_LEVEL, audio=CHUNK, reference_rolls=12,
)  # fmt: skip


def _flow_euler(steps: int) -> dict[str, Any]:
    """What LiveAvatar's scheduler makes of so many steps: even levels from 1 down to the lowest of 1000 that were shifted by 3,
    shifted by 3 once more, in float32 (FlowMatchEulerDiscreteScheduler.set_timesteps)."""
    last = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1 + (last - 1) * step / (steps - 1) for step in range(steps)]
    return dict(timesteps=tuple(TIMESTEPS * _float32(3 * u / (1 + 2 * u)) for u in even), warp=False, shift=3.0)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("self_forcing", "Self-Forcing", "arXiv 2506.08009", names=(r"self.?forcing",), **_SELF),
        Preset(
            "causal_forcing", "Causal-Forcing, chunk-wise", "arXiv 2602.02214", names=(r"causal.?forcing|chunk.?wise",),
            files=("chunkwise/causal_forcing.pt",), longer=_ROLLS, compared_chunks=12,
            note="of a file with generator and generator_ema its command takes generator",
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
            levels=_CAUSVID_LEVELS, compared_chunks=14,
            note="at a restart CausVid decodes and encodes the first overlapping picture again; here, and in that comparison, "
            "latents stay latents; its command takes generator of the file",
        ),
        Preset(
            "longlive", "LongLive", "arXiv 2509.22622", names=(r"long.?live",),
            window_frames=6, anchor=AnchorStatic(3), files=("longlive_base.pt", "lora.pt"), trained_frames=240,
            compared_chunks=12, one_pass_recache=True,
            note="longlive_base.pt wants its LoRA (rank 256): put Load Causal LoRA between the loader and the rollout; its command "
            "takes generator of a file that has generator_ema, too",
            longer="for more than 957 frames set positions to packed, which is LongLive's infinite mode", longer_positions="packed",
        ),
        Preset(
            "longlive2_5b", "LongLive 2.0, 5B", _LONGLIVE2_SOURCE, names=(r"long.?live",), **_flow_unipc(4), **_LONGLIVE2,
            files=("model_bf16.pt", "LongLive-2.0-5B-NVFP4-S4/model_te.pt"),
            note="a generator without its LoRA (rank 128) merged into it wants it: put Load Causal LoRA between the loader and the "
            "rollout; model_4o6.pt is packed in 4 bits and not read",
        ),
        Preset(
            "longlive2_5b_2step", "LongLive 2.0, 5B, 2 steps", _LONGLIVE2_SOURCE, **_flow_unipc(2), **_LONGLIVE2,
            names=(r"long.?live.*(?<![a-z0-9])(s2|2.?steps?)(?![a-z0-9])", r"(?<![a-z0-9.])2.?steps?(?![a-z0-9]).*long.?live"),
            files=("LongLive-2.0-5B-NVFP4-S2/model_te.pt",), note="model_4o6.pt is packed in 4 bits and not read",
        ),
        Preset(
            "rolling_forcing", "Rolling Forcing", "arXiv 2509.25161", names=(r"rolling.?forcing|longvideo",),
            timesteps=(1000.0, 800.0, 600.0, 400.0, 200.0), positions="packed",
            anchor=AnchorStatic(3), blocks=5, shares_window=True, files=("rolling_forcing_dmd.pt", "chunkwise/longvideo.pt"),
            note="equals its published loop to 1e-4 over 13 chunks, the end included",
        ),
        Preset(
            "reward_forcing", "Reward Forcing", "arXiv 2512.04678", names=(r"reward.?forcing",),
            window_frames=3, positions="packed", anchor=AnchorEMA(3, 0.999), compared_chunks=12,
        ),
        Preset(
            "infinity_rope", "Infinity-RoPE, on Self-Forcing weights", "arXiv 2511.20649", names=(r"infinity.?rope",),
            window_frames=2, positions="packed", anchor=AnchorStatic(1), compared_chunks=12,
        ),
        Preset(
            "memrope", "MemRoPE, on Self-Forcing or LongLive weights", "Kim et al. 2026", names=(r"memrope",),
            window_frames=4, positions="packed", anchor=AnchorMemory(3), compared_chunks=12,
            note="on LongLive's weights its command takes generator and the LoRA, on Self-Forcing's generator_ema",
        ),
        Preset(
            "rolling_sink", "Rolling Sink, on Self-Forcing weights", "arXiv 2602.07775", names=(r"rolling.?sink",),
            anchor=AnchorReplay(21), compared_chunks=20,
        ),
        Preset(
            "deep_forcing", "Deep Forcing, on Self-Forcing weights", "arXiv 2512.05081", names=(r"deep.?forcing|deep.?sink",),
            window_frames=8, positions="packed", anchor=AnchorDeep(),
            note="the paper's rule; for that of the authors' code connect Anchor: Deep Sink with shift_selected off",
        ),
        Preset(
            **_KREA, timesteps=_KREA_TOLD, warp=False, levels=_KREA_LEVELS, window_frames=3, positions="packed", remade="newest",
            compared_chunks=12, cached=Preset(**_KREA, longer=_ROLLS),
            note="that comparison is made with the picture and with the latent in its place; 14 B: plan the memory first (a latent "
            "frame takes 1.19 GiB at 832x480 in bf16)",
        ),
        Preset(
            "liveavatar", "LiveAvatar, on Wan 2.2 S2V 14B", "Alibaba-Quark/LiveAvatar", names=(r"live.?avatar",), **_flow_euler(4),
            **_LIVEAVATAR, lora_scale=0.5, files=("liveavatar.safetensors",), compared_chunks=6,
            note="liveavatar.safetensors is a LoRA of Wan 2.2 S2V (rank 128, trained at scale 0.5, which Load Causal LoRA knows): "
            "put it between the loader and Model Preset. Where the reference stands is drawn from the seed, chunk and step",
        ),
        Preset(
            "liveavatar_one_window", "LiveAvatar, one window for all steps", "Alibaba-Quark/LiveAvatar", **_flow_euler(4),
            **_LIVEAVATAR | dict(history=LAST_LEVEL),
            note="not the published rule: all steps see what the last one cached, so one window does for four; what "
            "that does to its pictures was never seen",
        ),
        Preset("adastate", "AdaState", "arXiv 2605.30349", names=(r"ada.?state",), **_STATE),
        Preset(
            "adastate_long", "AdaState, trained with horizon weight 4", "arXiv 2605.30349", names=(r"ada.?state.*(long|alpha.?4)",),
            note="its page names these weights for 30 s and longer; they roll out by the same rules as the others", **_STATE,
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
    "liveavatar",
    "adastate_long",
    "adastate",
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
    "longlive2_5b_2step",
    "longlive2_5b",
    "longlive",
    "causal_forcing",
    "causvid",
    "self_forcing",
)


def recognised(
    path: str, part: str = "", space: LatentSpace = WAN21, written_as: str = "", driven_by_sound: bool = False
) -> str:
    """The preset that a file speaks for by its name (with its folder), by what its writer called its format, and by the model taken
    out of it; empty if none does. Only one whose weights are of the file's latent space, and hear a sound only if these do.

    The systems on one space share one architecture, so their weights cannot be told apart: of Wan 2.1's a trainer's file with a
    generator in it (`part`) is taken for Self-Forcing's kin.
    """
    others = [name for name in PRESETS if name not in _TELLING]
    ours = [name for name in (*others, *_TELLING) if PRESETS[name].space == space]
    ours = [name for name in ours if driven_by_sound or not PRESETS[name].driven_by_sound]
    for text in (path.lower(), written_as.lower()):
        for name in ours:
            if any(re.search(pattern, text) for pattern in PRESETS[name].names):
                return name
    kin = part.startswith("generator") and space == PRESETS["self_forcing"].space and not driven_by_sound
    return "self_forcing" if kin else ""
