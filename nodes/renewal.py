"""Pictures of a video that are encoded anew, where the past of a chunk begins with one (adastate_core/remade.py).

While a stream decodes, the decoder keeps the last picture of each latent frame that will be wanted. Before the next chunk the
rollout asks for that frame, and the picture is encoded alone by the stream's VAE. A state holds the pictures and not what they
were encoded to, so encoding can fail and be tried again by whoever goes on.
"""

from __future__ import annotations

from typing import Any

import torch

from ..adastate_core.remade import renewed_frames
from ..adastate_core.rollout import Rollout, RolloutSpec, RolloutState
from ..adastate_core.states.renewed_pictures import pictures_of, saved_pictures
from .host import model as host_model
from .host.codec import HostDecoder, encode_alone


class Renewal:
    """What a run encodes anew, and how often. Without a decoder that can encode, latents are taken (`encodes` is False)."""

    def __init__(self, model: Any, spec: RolloutSpec, decoder: HostDecoder | None) -> None:
        self.model, self.spec = model, spec
        self.encodes = spec.remade == "newest" and decoder is not None and not decoder.tiny
        self._decoder = decoder if self.encodes else None
        self.encoded = self.taken = 0

    def join(self, rollout: Rollout, resume: RolloutState | None) -> None:
        """Answer `rollout`, which goes on from `resume`, from now on."""
        rollout.renewed = self._renewed
        if self._decoder is None:
            return
        if resume is not None:
            self._decoder.kept_pictures = pictures_of(resume.stream)
        self.watch(rollout)

    def first_kept(self, resume: RolloutState) -> int:
        """The first latent frame of a state whose picture is wanted, or its length."""
        wanted = renewed_frames(self.spec, resume.next_frame, resume.next_chunk) if self.encodes else ()
        return min((resume.emitted, *wanted))

    def watch(self, rollout: Rollout) -> None:
        """Before the rollout's newest frames are decoded: which of their pictures are to be kept."""
        if self._decoder is not None:
            self._decoder.keep_pictures_of(rollout.renewed_frames)

    def _renewed(self, frame: int) -> torch.Tensor | None:
        """A core.remade.Renewed."""
        picture = self._decoder.kept_pictures.get(frame) if self._decoder is not None else None
        if picture is None:
            self.taken += 1
            return None
        latent = host_model.to_model_space(self.model, encode_alone(self._decoder.vae, picture))
        self.encoded += 1
        return latent

    def snapshot(self) -> dict[str, Any]:
        """What a state's stream keeps of it."""
        return saved_pictures(self._decoder.kept_pictures) if self._decoder is not None else {}

    def notes(self) -> list[str]:
        """What may surprise before anything is rolled out, a sentence each."""
        if self.spec.remade != "newest" or self.encodes:
            return []
        return [
            "from the third chunk on the past begins with a latent, where the preset's system encodes that frame's picture anew: "
            "that takes a stream (Stream To Video) with a full VAE"
        ]

    def report(self) -> dict[str, Any]:
        """JSON-able: how the past was made anew; nothing where it was cached."""
        if not self.spec.remade:
            return {}
        return {"past": {"made_anew": self.spec.remade, "encoded_anew": self.encoded, "latents_taken": self.taken}}
