"""The host's loaded VAE, full or tiny, as a streaming decoder."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch

from ...adastate_core.decode import tiny_vae as taehv_stream
from ...adastate_core.decode import wan_vae as vae_stream
from ...adastate_core.decode.tiny_vae import TaehvStream
from ...adastate_core.decode.wan_vae import NonFinitePicturesError, VaeStream
from ...adastate_core.families.wan21 import WAN21_TEXT

LATENT_SPACES = ("auto", "vae", "model")
# the decoders are of one family's VAEs
FAMILY = WAN21_TEXT
SPACE = FAMILY.space
_FULL, _TINY = FAMILY.vae_classes["full"], FAMILY.vae_classes["tiny"]
_HOW = "(start ComfyUI with --fp32-vae or --bf16-vae)"
_WORDS = {None: "a full Wan 2.1 VAE", taehv_stream.KIND: "a tiny VAE"}


def check_vae(vae: Any) -> None:
    """ValueError, naming what was given, unless `vae` is a causal Wan 2.1 VAE, full or tiny, with 16 channels."""
    name = type(getattr(vae, "first_stage_model", None)).__name__
    channels = getattr(vae, "latent_channels", 0)
    if name not in (_FULL, _TINY) or channels != SPACE.channels:
        other = f" with {channels} channels" if name in (_FULL, _TINY) else ""
        raise ValueError(
            f"the vae is a {name}{other}; streaming decode needs a {SPACE.name} VAE ({SPACE.channels} channels): "
            f"{FAMILY.vae_examples}"
        )


def check_encoder(vae: Any) -> None:
    """ValueError, naming what was given, unless `vae` is a full Wan 2.1 VAE."""
    check_vae(vae)
    if type(vae.first_stage_model).__name__ == _TINY:
        raise ValueError(
            "the vae is a tiny VAE, which decodes only; encoding needs a full Wan 2.1 VAE: load wan_2.1_vae, or the demo's"
        )


def encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [4 n + 1, H, W, 3] in 0..1 to a latent [1, 16, n + 1, H / 8, W / 8] in VAE space, float32, as VAE Encode.

    ValueError if the VAE makes another number of latent frames of them, NonFinitePicturesError if they are not finite.
    """
    check_encoder(vae)
    latents = vae.encode(pictures[..., :3])
    frames, count = SPACE.latents(len(pictures)), len(pictures)
    if latents.ndim != 5 or latents.shape[2] != frames:
        raise ValueError(
            f"the vae made a latent {list(latents.shape)} of {count} frames, where a Wan 2.1 VAE makes {frames} latent frames; "
            "load wan_2.1_vae, or the demo's"
        )
    if not bool(torch.isfinite(latents).all()):
        raise NonFinitePicturesError(
            f"the VAE gave NaN or infinite values in the latent of {count} frames; run it in float32 or bfloat16 {_HOW}, or "
            "load another one"
        )
    return latents


class HostDecoder:
    """One stream of latents to pictures through the host's VAE, in its dtype, on its device.

    A tiny VAE is fed what `latent_space` says: latents in VAE space, or in the model's (normalised).
    """

    def __init__(self, vae: Any, frames_per_call: int = 1, latent_space: str = "auto") -> None:
        check_vae(vae)
        self.vae, self.tiny = vae, type(vae.first_stage_model).__name__ == _TINY
        self.model_space = _takes_model_space(vae, self.tiny, latent_space)
        if self.tiny:
            self.stream = TaehvStream(vae.first_stage_model.decoder, frames_per_call)
        else:
            self.stream = VaeStream(vae.first_stage_model, frames_per_call)

    @property
    def patcher(self) -> Any:
        """The model patcher to load beside others."""
        return self.vae.patcher

    def describe(self) -> str:
        """What decodes, for a report."""
        space = "model" if self.model_space else "VAE"
        return f"{_WORDS[self._kind]}, {space}-space latents"

    def cache_bytes(self, batch: int, height: int, width: int) -> int:
        """Bytes that the carried cache will take, for latents [batch, 16, t, height, width]."""
        if self.tiny:
            return taehv_stream.cache_bytes(self.stream.decoder, height, width, batch, self.vae.vae_dtype)
        return vae_stream.cache_bytes(_width(self.vae), height, width, batch, self.vae.vae_dtype)

    def working_bytes(self, batch: int, height: int, width: int) -> int:
        """What a chunk's decode takes beside the cache: the host's reckoning for each item, and the cache before it."""
        one = int(self.vae.memory_used_decode((1, SPACE.channels, 1, height, width), self.vae.vae_dtype))
        frames = self.stream.frames_per_call if self.tiny else 1
        return batch * frames * one + self.cache_bytes(batch, height, width)

    def load(self, shape: torch.Size) -> None:
        """Bring the VAE to its device, with room for its cache. `shape` is that of the latents."""
        batch, height, width = shape[0], shape[3], shape[4]
        needed = self.cache_bytes(batch, height, width) + self.working_bytes(batch, height, width)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 16, n, h, w] in VAE space to pictures [B, t, H, W, 3] float32 in 0..1 on the host's output device.

        NonFinitePicturesError, with the stream as before, for NaN or infinity among them.
        """
        fed = (
            getattr(comfy.latent_formats, SPACE.latent_format)().process_in(latents.float())
            if self.model_space
            else latents
        )
        moved = fed.to(self.vae.vae_dtype).to(self.vae.device)
        try:
            pictures = self.stream.step(moved).to(self.vae.output_device).float()
        except NonFinitePicturesError as error:
            raise NonFinitePicturesError(f"{error} {_HOW}") from None
        return pictures if self.tiny else self.vae.process_output(pictures)

    @property
    def reach(self) -> int | None:
        """Latent frames that a stream which begins anew has to see until it stands, to the bit, where one that has seen them all
        does; None where that is not known."""
        return self.stream.reach

    def skip(self, latents: int) -> None:
        """Begin anew after so many latents of a video: pictures are right once `reach` more were seen."""
        self.stream.skip(latents)

    def mark(self) -> Any:
        return self.stream.mark()

    def rewind(self, mark: Any) -> None:
        self.stream.rewind(mark)

    def snapshot(self) -> dict[str, Any]:
        return self.stream.snapshot()

    def restore(self, saved: dict[str, Any]) -> None:
        if reason := self.foreign(saved):
            raise ValueError(reason)
        self.stream.restore(saved, self.vae.device, self.vae.vae_dtype)

    @property
    def _kind(self) -> str | None:
        return taehv_stream.KIND if self.tiny else None

    def foreign(self, saved: dict[str, Any]) -> str | None:
        """Why the cache in `saved` is of no use to this decoder, or None."""
        kind = saved.get("vae_kind")
        if kind == self._kind:
            return None
        theirs = _WORDS.get(str(kind) if kind is not None else None, "another VAE")
        return f"the state's video was decoded by {theirs} and the vae connected is {_WORDS[self._kind]}"


def _takes_model_space(vae: Any, tiny: bool, latent_space: str) -> bool:
    """Whether the decoder is fed normalised latents.

    The files of taew2_1 (model space, published in float16) and lighttaew2_1 (VAE space, in wider types) have the same
    layout, and a loaded VAE has no name. But the host takes a float16 file for Hunyuan's and gives it that rescaling,
    which the layers driven here do not contain: its mark tells the two apart.
    """
    if latent_space not in LATENT_SPACES:
        raise ValueError(f"latent_space is {latent_space!r}; it must be one of {', '.join(LATENT_SPACES)}")
    if tiny:
        marked = getattr(vae.first_stage_model, "latent_format", None) is not None
        return marked if latent_space == "auto" else latent_space == "model"
    if latent_space == "model":
        raise ValueError("latent_space is model, but a full Wan VAE takes VAE-space latents; choose auto")
    return False


def _width(vae: Any) -> int:
    return int(vae.first_stage_model.decoder.head[0].gamma.shape[0])
