"""Where the frames of a rollout go, as Stream To Video sets it, and whether a state can go on into such a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..adastate_core.rollout import RolloutState
from .host.codec import HostDecoder


@dataclass(frozen=True)
class StreamSettings:
    """What AdaStateStreamOutput sets: where the frames of a rollout go."""

    vae: Any = field(repr=False)
    filename_prefix: str
    fps: float
    codec: str
    quality: int
    preview: bool
    autosave_seconds: float = 60.0
    join: bool = False
    latent_space: str = "auto"
    history_chunks: int = 0
    history_states: int = 8


def check_streamable(state: RolloutState, decoder: HostDecoder) -> None:
    """ValueError unless a stream through `decoder` can go on where `state` ends."""
    seen = state.stream.get("vae_latents_seen")
    if seen is not None and seen != state.emitted:
        raise ValueError(
            "the state's decoder cache belongs to another frame: it is damaged; resume it without a stream"
        )
    if seen is None and state.latents is None and state.emitted:
        raise ValueError(
            "the state was made without a stream and without keep_latents, so its video cannot be decoded further; "
            "resume it without a stream, or make it again with one"
        )
    if seen and state.latents is None and (reason := decoder.foreign(state.stream)):
        raise ValueError(f"{reason}; connect a VAE of the same kind, or resume without a stream")
