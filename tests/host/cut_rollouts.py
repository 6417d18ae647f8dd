"""Streamed rollouts of many settings as graphs of the host: what of the pack meets what cuts them short."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tiny_5b
import torch
from conftest import random_vae, random_wan
from cut_prompts import ROLLOUT
from small_enlargers import load_upscaler
from sounds import siren
from test_links import LATENT, STATE, node
from tiny_s2v import SIZES, features, tiny_s2v

SIDE = 32
ROLLED = {
    "width": SIDE, "height": SIDE, "length": 33, "batch_size": 1, "seed": 5, "steps": 2, "shift": 5.0, "chunk_frames": 3,
    "window_frames": 3, "positions": "packed", "keep_latents": True,
}  # fmt: skip
STREAMED = {
    "filename_prefix": "take",
    "fps": 16.0,
    "codec": "ffv1",
    "quality": 18,
    "preview": False,
    "autosave_seconds": 1e-6,
}
LINKED = {"model": ["1", 0], "positive": ["2", 0], "stream": ["4", 0]}
AUTO = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto"}
ABSORBED = {
    "ratio": 0.5, "warmup_frames": 6, "local_window_frames": 1, "sink_frames": 1, "ridge": "auto", "scope": "head", "rank": 8,
    "select": "sensitivity", "absorb": True, "schedule": "once",
}  # fmt: skip
WORDS = {"terrain": "snow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}


@dataclass(frozen=True)
class Settings:
    """A rollout: what is other than ROLLED and STREAMED, more nodes, and the family of its models."""

    rolled: dict[str, Any] = field(default_factory=dict)
    streamed: dict[str, Any] = field(default_factory=dict)
    more: dict[str, dict] = field(default_factory=dict)
    family: str = ""
    frames: bool = False

    @property
    def batch(self) -> int:
        return self.rolled.get("batch_size", 1)

    @property
    def exact(self) -> bool:
        """Whether its files hold the pictures to the bit, so that joined frames are those of the whole."""
        return self.streamed.get("codec", STREAMED["codec"]) == "ffv1"

    @property
    def length(self) -> int:
        return self.rolled.get("length", ROLLED["length"])

    def graph(self, prefix: str, resume: str = "", **streamed: Any) -> dict[str, dict]:
        """All of it, with LATENT and STATE taken; `resume`: a state's name in the output folder."""
        graph = {
            "1": node(f"GivenModel{self.family}"),
            "2": node("GivenPositive"),
            "3": node(f"GivenVae{self.family}"),
            "4": node("AdaStateStreamOutput", vae=["3", 0], **STREAMED | self.streamed | {"filename_prefix": prefix} | streamed),
            ROLLOUT: node("AdaStateRollout", **LINKED | ROLLED | self.rolled),
        }  # fmt: skip
        for slot in (LATENT, STATE):
            graph[f"take {slot}"] = node("Take", value=[ROLLOUT, slot], slot=slot)
        if self.frames:
            graph["frames"] = node(
                "AdaStateStreamFrames", stream=["4", 0], filename_prefix=f"{prefix}-frames", format="png", fps=0.0, preview=False
            )  # fmt: skip
            graph[ROLLOUT]["inputs"]["stream"] = ["frames", 0]
        if resume:
            graph["state"] = node("AdaStateLoadState", file=resume)
            graph[ROLLOUT]["inputs"]["resume"] = ["state", 0]
        return graph | self.more


def _prompts() -> dict[str, dict]:
    """Two prompts, of which the second makes the past anew."""
    return {
        "first": node("AdaStateDemoPrompt", **WORDS),
        "second": node("AdaStateDemoPrompt", **WORDS | {"terrain": "city"}),
        "at0": node("AdaStatePromptAt", positive=["first", 0], seconds=0.0, transition="cut"),
        "at1": node(
            "AdaStatePromptAt",
            positive=["second", 0],
            seconds=1.0,
            transition="recache",
            prompts=["at0", 0],
            blend_chunks=2,
        ),
    }


SETTINGS = {
    "plain": Settings(),
    "adaptive anchor, with a history": Settings(
        {"anchor": ["anchor", 0]},
        {"history_chunks": 1, "history_states": 2, "preview": True},
        {"anchor": node("AdaStateAnchorAdaptive", state_frames=1)},
    ),
    "int8, two videos": Settings({"cache_dtype": "int8", "batch_size": 2}, {"keep_state": True}),
    "absorption": Settings(
        {"absorption": ["absorption", 0], "window_frames": 12, "length": 45},
        more={"absorption": node("AdaStateAbsorption", **ABSORBED)},
    ),
    "chunks together": Settings(
        {"model": ["preset", 0], "length": 93} | AUTO,
        more={"preset": node("AdaStateModelPreset", model=["1", 0], preset="rolling_forcing")},
    ),
    "transitions": Settings({"positive": ["at1", 0]}, more=_prompts()),
    "sound, decode beside": Settings({}, {"audio": ["sound", 0], "autosave_seconds": 0.0}, {"sound": node("GivenSound")}),
    "decode beside": Settings({}, {"autosave_seconds": 0.0, "codec": "h264"}),
    "host memory, moving average": Settings(
        {"cache_device": "host memory", "anchor": ["anchor", 0]},
        {},
        {"anchor": node("AdaStateAnchorEMA", sink_frames=1, decay=0.9)},
    ),
    "frames beside the video": Settings(frames=True),
    "5B": Settings({"anchor": ["anchor", 0]}, {}, {"anchor": node("AdaStateAnchorStatic", sink_frames=1)}, "5B"),
    "enlarged": Settings({}, {"upscale_model": ["upscaler", 0]}, {"upscaler": node("GivenUpscaler")}),
    "a picture that speaks": Settings(
        {"audio": ["track", 0], "reference": ["picture", 0], "width": 64, "height": 64},
        {},
        {
            "picture": node("GivenPicture"),
            "sound": node("GivenSound"),
            "heard": node("GivenHeard"),
            "track": node("AdaStateAudio", audio=["sound", 0], encoded=["heard", 0], fps=0.0, offset=0.0),
        },
        "S2V",
    ),
}  # fmt: skip


def models(folder: Any) -> dict[str, tuple[str, Any]]:
    """What the graphs' Given nodes give, loaded once: tiny random models in the real formats."""
    import comfy.sd

    sound = {"waveform": torch.from_numpy(siren(16_000, 3.0))[None], "sample_rate": 16_000}
    layers = features(3.0)
    heard = {"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": 16_000 * 3}
    vae = ("VAE", comfy.sd.VAE(sd=random_vae()))
    positive = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1)), {}]]
    return {
        "GivenModel": ("MODEL", comfy.sd.load_diffusion_model_state_dict(random_wan())),
        "GivenVae": vae,
        "GivenPositive": ("CONDITIONING", positive),
        "GivenModel5B": ("MODEL", tiny_5b.loaded_model()),
        "GivenVae5B": ("VAE", tiny_5b.loaded_vae()),
        "GivenModelS2V": ("MODEL", comfy.sd.load_diffusion_model_state_dict(tiny_s2v(*SIZES["one block"]))),
        "GivenVaeS2V": vae,
        "GivenHeard": ("AUDIO_ENCODER_OUTPUT", heard),
        "GivenPicture": ("IMAGE", torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(3))),
        "GivenSound": ("AUDIO", sound),
        "GivenUpscaler": ("UPSCALE_MODEL", load_upscaler(folder)),
        "GivenNothing": ("INT", 0),
    }
