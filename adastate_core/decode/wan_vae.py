"""Causal Wan VAE decode that carries its feature cache between calls, at memory that does not depend on length.

A Wan VAE decodes one latent frame a call against a list of what its causal convolutions saw last; the first latent
gives 1 picture, every later one 4 (Wan 2.1, modules/vae.py). The stock decode throws the list away; here it is the
state, so any split of a video decodes to the bits of one whole decode. Both decoder generations of the host work:
the one that returns a tensor, and the newer one that returns a list of pieces. What differs by the VAE's make, its
WanMake knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..files.header_check import Damage, Fields
from ..geometry import WAN21
from .carried_check import carried
from .wan_makes import VAE_2_1, WanMake

# More than any decoder needs (33 causal convolutions in Wan 2.1's, 34 in 2.2's); unused entries stay None.
FEATURES = 64
# What the decoder leaves in the list between the first and the second call of a temporal upsampler.
FIRST_CALL_MARKER = "Rep"
_DAMAGED = "the state's decoder cache is damaged: {}; resume without a stream, or make it again"


def cache_bytes(width: int, rows: int, columns: int, batch: int, dtype: torch.dtype, make: WanMake = VAE_2_1) -> int:
    """Bytes of the carried cache once it is full; see WanMake.cache_bytes."""
    return make.cache_bytes(width, rows, columns, batch, dtype)


def pictures_of(latents: int) -> int:
    """Video frames that `latents` latent frames decode to: 1, then 4 each."""
    return WAN21.pictures(latents)


class NonFinitePicturesError(RuntimeError):
    """A decoder gave NaN or infinity; its stream stands before the call."""


def all_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A bool scalar on the tensor's device, which is not waited for. `tensor` holds at least one value."""
    if tensor.device.type in ("cpu", "cuda"):
        # One pass that makes no second tensor, a twentieth of isfinite's time on a CPU; elsewhere NaN may get lost in it.
        return torch.isfinite(torch.stack(torch.aminmax(tensor))).all()
    return torch.isfinite(tensor).all()


def require_finite(latents: torch.Tensor, first: int, made: Iterable[torch.Tensor]) -> None:
    """NonFinitePicturesError unless all that a decoder `made` of latents [B, C, n, h, w] from latent frame `first` on is
    finite, ValueError if the latents themselves are not. It waits for the device once, whatever is checked."""
    if bool(torch.stack([all_finite(tensor) for tensor in made]).all()):
        return
    last = first + latents.shape[2] - 1
    where = f"latent frame {first}" if first == last else f"latent frames {first} to {last}"
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(
            f"the latent holds NaN or infinite values in {where}, which decode to no picture; make it again"
        )
    raise NonFinitePicturesError(
        f"the VAE, which runs in {str(latents.dtype).removeprefix('torch.')}, gave NaN or infinite values for {where}; "
        "run it in float32 or bfloat16, or load another one"
    )


class VaeStream:
    """One stream's decoder: `step` latents through it in order; `snapshot` and `restore` move it to another run.

    `codec` is a Wan VAE module (`conv2`, `decoder`) of that `make`. `frames_per_call` above 1 is faster on some devices
    and exact to rounding only (benchmarks/decode.py); the first latent always goes alone.
    """

    def __init__(self, codec: nn.Module, frames_per_call: int = 1, make: WanMake = VAE_2_1) -> None:
        if frames_per_call < 1:
            raise ValueError(f"frames_per_call is {frames_per_call}; it must be at least 1")
        self.codec, self.frames_per_call, self.make = codec, frames_per_call, make
        # how latents, and entries from a file, are laid out in memory before the codec gets them, if that matters to it
        self.layout: torch.memory_format | None = None
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self._features: list[torch.Tensor | str | None] = [None] * FEATURES
        self.latents_seen = 0
        self._unproven = False  # whether the entries are a file's, and no call has used them yet

    @property
    def reach(self) -> int | None:
        """Latent frames after which a stream that begins anew stands, to the bit, where one that has seen the whole video does;
        None for a decoder of another make.

        What a call keeps are the last frames that came into each causal convolution, as many as its kernel is long less one,
        at the latents' rate or a higher one; a stream's first latent, which the temporal upsamplers treat in a way of their
        own, costs each at most one more.
        """
        kernels = [m.kernel_size[0] for m in self.codec.decoder.modules() if isinstance(m, nn.Conv3d)]
        looks_back = [size for size in kernels if size > 1]
        return sum(looks_back) + 1 if looks_back else None

    def skip(self, latents: int) -> None:
        """Begin anew after so many latents of a video: what comes out is right once `reach` more were seen."""
        self.reset()
        self.latents_seen = latents

    @property
    def nbytes(self) -> int:
        """Bytes of the carried cache."""
        return sum(t.nbytes for t in self._features if isinstance(t, torch.Tensor))

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, n, h, w] in VAE space, on the codec's device and dtype, to pictures [B, t, H, W, 3] about -1..1.

        t is 4n, or 4n - 3 when these are the first latents of the video. If it raises, the stream is as before: so does
        NonFinitePicturesError, for a picture or a carried value that is not finite.
        """
        before = self.mark()
        if self.layout is not None:
            latents = latents.contiguous(memory_format=self.layout)
        pieces = []
        start = 0
        try:
            while start < latents.shape[2]:
                first = all(entry is None for entry in self._features)
                part = latents[:, :, start : start + (1 if first else self.frames_per_call)]
                pieces += self._call(part, first)
                start += part.shape[2]
                self.latents_seen += part.shape[2]
            pictures = torch.cat(pieces, dim=2).movedim(1, -1)
            carried = [entry for entry in self._features if isinstance(entry, torch.Tensor)]
            require_finite(latents, before[1], [pictures, *carried])
        except BaseException:
            # A decoder replaces the list's tensors, it never writes into them: the old ones are still whole.
            self.rewind(before)
            raise
        return pictures

    def _call(self, latents: torch.Tensor, first: bool) -> list[torch.Tensor]:
        before = list(self._features)
        pieces = self.make.decode(self.codec, latents, self._features, first)
        if self._unproven:
            self._prove(before)
        for i, (old, new) in enumerate(zip(before, self._features, strict=True)):
            self._features[i] = _kept(old, new)
        return pieces

    def mark(self) -> tuple[list, int]:
        """The stream as it stands, for `rewind`: references, no copies."""
        return list(self._features), self.latents_seen

    def rewind(self, mark: tuple[list, int]) -> None:
        """Back to where `mark` was taken."""
        self._features, self.latents_seen = list(mark[0]), mark[1]

    def snapshot(self) -> dict[str, Any]:
        """The stream between two calls: numbers, and copies on the CPU of the carried tensors."""
        saved: dict[str, Any] = {
            "vae_latents_seen": self.latents_seen,
            "vae_markers": [i for i, entry in enumerate(self._features) if isinstance(entry, str)],
        }
        for i, entry in enumerate(self._features):
            if isinstance(entry, torch.Tensor):
                saved[f"vae_feature_{i}"] = entry.detach().to("cpu", copy=True)
        return saved

    def restore(self, saved: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> None:
        """Go on from a snapshot; ValueError if there is none in `saved` or it is damaged.

        Which entries this decoder has is known once it has run: a missing one is told by the first `step`.
        """
        self.reset()
        if "vae_latents_seen" not in saved:
            raise ValueError("the state holds no decoder cache; it was not made by a streamed rollout")
        fields = Fields(saved)
        try:
            seen = fields.whole("vae_latents_seen")
            marks = fields.wholes("vae_markers", 0, FEATURES - 1)
            features = carried(saved, "vae_feature_", 5, seen, marks)
            if len(features) + len(marks) > FEATURES:
                raise Damage(f"it has {len(features) + len(marks)} entries, and a decoder at most {FEATURES}")
        except Damage as error:
            raise ValueError(_DAMAGED.format(error)) from error
        for i in marks:
            self._features[i] = FIRST_CALL_MARKER
        for i, value in features.items():
            self._features[i] = value.to(
                device=device, dtype=dtype, copy=True, memory_format=self.layout or torch.contiguous_format
            )
        self.latents_seen, self._unproven = seen, bool(seen)

    def _prove(self, before: list[torch.Tensor | str | None]) -> None:
        """After the first call that goes on from a file: every entry was there, and is one that the decoder takes."""
        for i, (old, new) in enumerate(zip(before, self._features, strict=True)):
            if (old is None and new is not None) or (isinstance(old, torch.Tensor) and new is old):
                what = "missing" if old is None else "not one of this decoder's"
                raise ValueError(_DAMAGED.format(f"vae_feature_{i} is {what}"))
        self._unproven = False


def _kept(old: torch.Tensor | str | None, new: torch.Tensor | str | None) -> torch.Tensor | str | None:
    """An entry after a call, made to hold two frames: the newer decoders leave one where one frame came in.

    They are made for two latents a call, and with one the frame before last would count as zeros. Views are copied,
    so that an entry does not keep alive what it was cut from.
    """
    if not isinstance(new, torch.Tensor):
        return new
    if isinstance(old, torch.Tensor) and new is not old and new.shape[2] == 1:
        return torch.cat([old[:, :, -1:], new], dim=2)
    return new.clone() if new.untyped_storage().nbytes() > new.nbytes else new
