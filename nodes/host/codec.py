"""The host's loaded VAE, full or tiny, as a streaming decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch

from ...adastate_core.decode import tiny_vae as taehv_stream
from ...adastate_core.decode.tiny_vae import TaehvStream
from ...adastate_core.decode.wan_vae import NonFinitePicturesError, VaeStream
from ...adastate_core.decode.ways import FAST, PLAIN, WAY, way_of
from ...adastate_core.video.decoded_stream import old_caches
from ...adastate_core.video.picture_forms import in_form
from .fast_vae import FastVae, stood_in, why_not
from .vae_family import check_encoder, check_vae, is_tiny

LATENT_SPACES = ("auto", "vae", "model")
_AT_ONCE = 2**22  # values that are made pictures of together
_HOW = "(start ComfyUI with --fp32-vae or --bf16-vae)"
# latents a call of a tiny VAE on CUDA, the fast way: as many as a chunk has with nearly every model
_TINY_AT_ONCE = 3


def encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [4 n + 1, H, W, 3] in 0..1 to a latent [1, C, n + 1, h, w] in VAE space, float32, as VAE Encode.

    ValueError if the VAE makes another number of latent frames of them, NonFinitePicturesError if they are not finite.
    """
    family = check_encoder(vae)
    latents = vae.encode(pictures[..., :3])
    frames, count = family.space.latents(len(pictures)), len(pictures)
    if latents.ndim != 5 or latents.shape[2] != frames:
        raise ValueError(
            f"the vae made a latent {list(latents.shape)} of {count} frames, where a {family.space.name} VAE makes {frames} latent "
            f"frames; {family.full_examples}"
        )
    if not bool(torch.isfinite(latents).all()):
        raise NonFinitePicturesError(
            f"the VAE gave NaN or infinite values in the latent of {count} frames; run it in float32 or bfloat16 {_HOW}, or "
            "load another one"
        )
    return latents


def encode_alone(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, H, W, 3] float32 in 0..1, one a video, to latents [B, C, 1, h, w] in VAE space, float32 on the CPU: the
    bits of VAE Encode of each.

    The VAE has to be on its device: it is not loaded for this, which could move a model out that is loaded beside it.
    NonFinitePicturesError if they are not finite.
    """
    made = []
    with torch.no_grad():
        for picture in pictures:
            pixels = vae.process_input(picture.movedim(-1, 0)[None, :, None]).to(vae.vae_dtype).to(vae.device)
            made.append(vae.first_stage_model.encode(pixels).float().cpu())
    latents = torch.cat(made)
    if not bool(torch.isfinite(latents).all()):
        raise NonFinitePicturesError(
            f"the VAE gave NaN or infinite values for a picture that it encodes anew; run it in float32 or bfloat16 {_HOW}, or "
            "load another one"
        )
    return latents


class HostDecoder:
    """One stream of latents to pictures through the host's VAE, in its dtype, on its device.

    A tiny VAE is fed what `latent_space` says: latents in VAE space, or in the model's (normalised).

    The plain way runs the VAE's own modules and gives VAE Decode's bits. The fast way gives its pictures to rounding, and the same
    bits however a video is split: a full VAE with stand-ins for its layers (fast_vae.py), a tiny one on CUDA with more latents a
    call. Where it cannot be gone, `why_plain` says why, and the plain one is.
    """

    def __init__(self, vae: Any, frames_per_call: int = 1, latent_space: str = "auto", fast: bool = False) -> None:
        self.family = check_vae(vae)
        self.space = self.family.space
        self.vae, self.tiny = vae, is_tiny(vae, self.family)
        self.model_space = _takes_model_space(vae, self.tiny, latent_space)
        self.frames_per_call = frames_per_call
        if self.tiny:
            self.stream = TaehvStream(vae.first_stage_model.decoder, frames_per_call)
        else:
            self.stream = VaeStream(vae.first_stage_model, frames_per_call, self.family.full_vae)
        # the last pictures [B, H, W, 3] float32 on the CPU of latent frames that somebody asked for
        self.kept_pictures: dict[int, torch.Tensor] = {}
        self._kept_frames: tuple[int, ...] = ()
        # pictures of the video's first latents that are nobody's, since the decoder had seen others before
        self._left_out = 0
        self.way, self.why_plain, self._fast = PLAIN, "the plain way was asked for", None
        if fast:
            self.why_plain = _why_tiny_plain(vae) if self.tiny else why_not(vae)
            self._go(PLAIN if self.why_plain else FAST)

    def _go(self, way: str) -> None:
        """Decode this way from now on; the fast one only where nothing speaks against it."""
        fast = way == FAST
        if self.tiny:
            self.stream.frames_per_call = max(self.frames_per_call, _TINY_AT_ONCE) if fast else self.frames_per_call
        else:
            self._fast = (self._fast or FastVae(self.vae, self.family.full_vae)) if fast else None
            self.stream.layout = torch.channels_last_3d if fast else None
        self.way = way

    @property
    def latents_a_call(self) -> int:
        """Latents that a call of the decoder takes at most."""
        return self.stream.frames_per_call

    def another(self) -> HostDecoder:
        """A decoder for another stream, the same way through the same VAE; where this one is loaded, so is that one."""
        other = copy.copy(self)
        other.stream = copy.copy(self.stream)
        other.stream.reset()
        other.kept_pictures, other._kept_frames, other._left_out = {}, (), 0
        return other

    @property
    def patcher(self) -> Any:
        """The model patcher to load beside others. Call `ready` after it was loaded."""
        return self._fast.patcher if self._fast else self.vae.patcher

    def describe(self) -> str:
        """What decodes, for a report."""
        space = "model" if self.model_space else "VAE"
        return f"{self._words(self._kind)}, {space}-space latents"

    def _words(self, kind: str | None) -> str:
        """A decoder of this one's latents, by its kind in a snapshot."""
        return {None: f"a full {self.space.name} VAE", taehv_stream.KIND: "a tiny VAE"}.get(kind, "another VAE")

    @property
    def described_way(self) -> str:
        """Which way it decodes, for a report; of the plain one also why."""
        return self.way if self.way == FAST else f"{PLAIN}: {self.why_plain}"

    def cache_bytes(self, batch: int, height: int, width: int) -> int:
        """Bytes that the carried cache will take, for latents [batch, C, t, height, width]."""
        if self.tiny:
            return taehv_stream.cache_bytes(self.stream.decoder, height, width, batch, self.vae.vae_dtype)
        return self.family.full_vae.cache_bytes(_width(self.vae), height, width, batch, self.vae.vae_dtype)

    def working_bytes(self, batch: int, height: int, width: int, encodes: bool = False) -> int:
        """What a chunk's decode takes beside the cache: the host's reckoning for each item, and the caches before it that a stream
        keeps. `encodes`: pictures are encoded anew between two chunks, one at a time."""
        one = int(self.vae.memory_used_decode((1, self.space.channels, 1, height, width), self.vae.vae_dtype))
        frames = self.stream.frames_per_call if self.tiny else 1
        cache = self.cache_bytes(batch, height, width)
        weights = self._fast.nbytes if self._fast else 0
        most = max(batch * frames * one, self.encoding_bytes(height, width) if encodes else 0)
        return most + old_caches(cache) * cache + weights

    def load(self, shape: torch.Size) -> None:
        """Bring the VAE to its device, with room for its cache. `shape` is that of the latents."""
        batch, height, width = shape[0], shape[3], shape[4]
        needed = self.cache_bytes(batch, height, width) + self.working_bytes(batch, height, width)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=needed)
        self.ready(batch, height, width)

    def ready(self, batch: int, height: int, width: int, told: Callable[[int, int], None] | None = None) -> list[str]:
        """After `patcher` was loaded: make ready for latents [batch, C, t, height, width]. If the fast way then turns out not to
        go, the plain one is gone, and a sentence says so. What is compiled, `told` hears of (done, of how many); it may raise."""
        if self._fast is None:
            return []
        self._fast.ready(batch, height, width, self.stream.frames_per_call, told)
        if not self._gave_up():
            return []
        comfy.model_management.load_models_gpu([self.patcher])
        return [f"the VAE decodes the plain way, slower and with other last bits: {self.why_plain}"]

    def _gave_up(self) -> bool:
        """If what the fast way calls could not be compiled, go the plain one."""
        failed = self._fast is not None and bool(self._fast.failed)
        if failed:
            self.why_plain = self._fast.failed
            self._go(PLAIN)
        return failed

    def _in_place(self) -> bool:
        """Whether the VAE's modules are those of this decoder's way; others may have been loaded since."""
        return self._fast.in_place if self._fast else self.tiny or not stood_in(self.vae)

    def step(self, latents: torch.Tensor, takes: str | None = None) -> torch.Tensor:
        """[B, C, n, h, w] in VAE space to pictures [B, t, H, W, 3] float32 in 0..1 on the host's output device.

        Or in a form that a sink `takes` (picture_forms.FORMS), the same values: on the VAE's device, where the VAE makes its output
        as the host's own do.

        NonFinitePicturesError, with the stream as before, for NaN or infinity among them.
        """
        fed = latents
        if self.model_space:
            fed = getattr(comfy.latent_formats, self.space.latent_format)().process_in(latents.float())
        moved = fed.to(self.vae.vae_dtype).to(self.vae.device)
        if not self._in_place():
            self.load(latents.shape)
        first = not self.stream.latents_seen
        try:
            pictures = self.stream.step(moved)
        except NonFinitePicturesError as error:
            raise NonFinitePicturesError(f"{error} {_HOW}") from None
        if first and self._left_out:
            pictures = pictures[:, self._left_out :]
        self._keep(pictures, latents.shape[2])
        self._gave_up()
        if takes is None or not self._any_device:
            pictures = self._output(pictures.to(self.vae.output_device))
            return pictures if takes is None else in_form(pictures, takes)
        return _in_parts(pictures, lambda part: in_form(self._output(part), takes))

    def warm(self, latents: torch.Tensor) -> None:
        """Before the first latents of a video: see others, [B, C, n, h, w] in VAE space, whose pictures are nobody's. The video's
        first latent frame is still one picture: of the four that it then makes, the last."""
        self._left_out = 0
        self.step(latents)
        self.stream.latents_seen = 0
        # a tiny VAE's stream leaves them out by itself where it has seen no latents
        self._left_out = 0 if self.tiny else self.space.temporal_stride - 1

    def keep_pictures_of(self, frames: Sequence[int]) -> None:
        """Keep the last picture of these latent frames of the video in `kept_pictures` when they are decoded, and no others."""
        self._kept_frames = tuple(frames)
        self.kept_pictures = {frame: self.kept_pictures[frame] for frame in frames if frame in self.kept_pictures}

    def _keep(self, pictures: torch.Tensor, latents: int) -> None:
        """Of the decoder's `pictures` [B, t, H, W, 3] of so many newest latents. All but a video's first latent have as many."""
        for frame in self._kept_frames:
            behind = self.stream.latents_seen - 1 - frame
            if 0 <= behind < latents:
                last = pictures[:, pictures.shape[1] - 1 - self.space.temporal_stride * behind]
                # a copy: newer hosts make pictures of the decoder's output in place
                output = self._output(last.to(self.vae.output_device, copy=True)[:, None])[:, 0]
                self.kept_pictures[frame] = output.float().to("cpu", copy=True)

    def encoding_bytes(self, height: int, width: int) -> int:
        """What encoding one picture of latent pixels [height, width] takes beside the weights, by the host's reckoning."""
        shape = (1, 3, 1, self.space.stride * height, self.space.stride * width)
        return int(self.vae.memory_used_encode(shape, self.vae.vae_dtype))

    def _output(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the decoder gave, as float32 in 0..1."""
        return pictures.float() if self.tiny else self.vae.process_output(pictures.float())

    @cached_property
    def _any_device(self) -> bool:
        """Whether what makes pictures of the decoder's output gives the same on any device and for any part: nothing at all, or the
        host's own (x + 1) / 2 within 0..1. Another VAE's is called as the host calls it."""
        if self.tiny:
            return True
        probe = torch.randn(1, 3, 8, 16, 3, generator=torch.Generator().manual_seed(0)).to(self.vae.output_device)
        expected = ((probe + 1) / 2).clamp(0, 1)
        made = self.vae.process_output(probe)
        return isinstance(made, torch.Tensor) and torch.equal(made, expected)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache that is carried."""
        return self.stream.nbytes

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
        """What a state keeps: the cache, and which way made it if it was not the plain one."""
        stream = self.stream
        if not stream.latents_seen:  # what it has seen before the video, it sees again where that begins
            stream = copy.copy(stream)
            stream.reset()
        return stream.snapshot() | ({} if self.way == PLAIN else {WAY: self.way})

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a snapshot, the way that made it where that can be gone."""
        if reason := self.foreign(saved):
            raise ValueError(reason)
        self.go_on(saved)
        self.stream.restore(saved, self.vae.device, self.vae.vae_dtype)

    def go_on(self, saved: dict[str, Any]) -> list[str]:
        """Before anything is loaded: go the way that made the cache in `saved`, if there is one that this decoder takes. Returns a
        sentence if that cannot be done."""
        if "vae_latents_seen" not in saved or self.foreign(saved):
            return []
        if way_of(saved) == PLAIN:
            self.why_plain = "the state's video was decoded the plain way"
            self._go(PLAIN)
        elif self.way == PLAIN:
            return [
                f"the state's video was decoded the fast way, and here it goes on the plain way ({self.why_plain}): its pictures "
                "differ in the last bits from those of one run"
            ]
        return []

    @property
    def _kind(self) -> str | None:
        return taehv_stream.KIND if self.tiny else None

    def foreign(self, saved: dict[str, Any]) -> str | None:
        """Why the cache in `saved` is of no use to this decoder, or None."""
        kind = saved.get("vae_kind")
        if kind == self._kind:
            return None
        theirs, mine = (self._words(None if one is None else str(one)) for one in (kind, self._kind))
        return f"the state's video was decoded by {theirs} and the vae connected is {mine}"


def _why_tiny_plain(vae: Any) -> str:
    """Why a tiny VAE is not given more latents a call, or ""."""
    device = vae.device.type
    return "" if device == "cuda" else f"a tiny VAE on {device} is no faster with more latents a call"


def _takes_model_space(vae: Any, tiny: bool, latent_space: str) -> bool:
    """Whether the decoder is fed normalised latents.

    The files of taew2_1 (model space, published in float16) and lighttaew2_1 (VAE space, in wider types) have the same
    layout, and a loaded VAE has no name. But the host takes a float16 file for Hunyuan's and gives it that rescaling,
    which the layers driven here do not contain: its mark tells the two apart. It marks none of 48 channels: what VAE Decode
    feeds them, lighttaew2_2's VAE space, is taken for these, and taew2_2 (model space) has to be told.
    """
    if latent_space not in LATENT_SPACES:
        raise ValueError(f"latent_space is {latent_space!r}; it must be one of {', '.join(LATENT_SPACES)}")
    if tiny:
        marked = getattr(vae.first_stage_model, "latent_format", None) is not None
        return marked if latent_space == "auto" else latent_space == "model"
    if latent_space == "model":
        raise ValueError("latent_space is model, but a full Wan VAE takes VAE-space latents; choose auto")
    return False


def _in_parts(pictures: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`make` of [B, t, H, W, 3], a few pictures at a time, so that what it takes on the way does not grow with their number."""
    frames = max(1, _AT_ONCE // max(1, pictures[:, :1].numel()))
    out: torch.Tensor | None = None
    for at in range(0, pictures.shape[1], frames):
        part = make(pictures[:, at : at + frames])
        if part.shape[1] == pictures.shape[1]:
            return part
        if out is None:
            out = torch.empty_like(pictures, dtype=part.dtype)
        out[:, at : at + frames] = part
    return out


def _width(vae: Any) -> int:
    return int(vae.first_stage_model.decoder.head[0].gamma.shape[0])
