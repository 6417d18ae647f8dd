"""The host's loaded Wan 2.2 S2V as a rollout's model: it hears a sound and is shown a reference.

The host's own forward runs, with the sound's encoder answered for: what it would make in every pass is made once for the frames of
a chunk. It is given neither reference nor motion, whose tokens the rollout keeps (adastate_core/reference.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import comfy.ldm.wan.model
import comfy.model_management
import torch
import torch.nn.functional as F

from ...adastate_core.attention.fused_blocks import PassForm
from ...adastate_core.attention.wan import SESSION
from ...adastate_core.audio.driving import DrivingSound
from ...adastate_core.cache.reference_tokens import MakingReference
from ...adastate_core.spec import RolloutSpec
from .model import HostModel, family_of_model

Pair = tuple[torch.Tensor, torch.Tensor]
_ENCODER = "casual_audio_encoder"  # as the host spells it


def model_for(patcher: Any, context: torch.Tensor, batch: int) -> HostModel:
    """A MODEL's as its family has it."""
    kind = SpeechModel if family_of_model(patcher).driven_by_sound else HostModel
    return kind(patcher, context, batch)


def sound_shape(patcher: Any) -> tuple[int, int]:
    """(layers of an audio encoder, channels of each) that a MODEL hears."""
    encoder = getattr(patcher.model.diffusion_model, _ENCODER)
    return encoder.weights.numel(), encoder.encoder.conv1_local.conv.in_channels


class SpeechModel(HostModel):
    """`hear` before `velocity`, and `refer` before both."""

    def __init__(self, patcher: Any, context: torch.Tensor, batch: int) -> None:
        # (global [B, frames, 1, D], local [B, frames, 5, D]) of the passes that follow, and what they are of
        self._encoded: Pair | None = None
        self._encoded_of: Hashable = None
        super().__init__(patcher, context, batch)
        self._channels = sound_shape(patcher)[1]

    def _prepared(self, patcher: Any) -> Any:
        clone = super()._prepared(patcher)
        path = f"diffusion_model.{_ENCODER}.forward"
        clone.add_object_patch(path, self._answering(patcher.get_model_object(path)))
        return clone

    def _answering(self, original: Callable[[torch.Tensor], Pair]) -> Callable[[torch.Tensor], Pair]:
        # the host leaves the forward in the model until it loads another clone of it: it must not keep a run's tensors alive
        held = weakref.ref(self)

        def forward(features: torch.Tensor) -> Pair:
            model = held()
            encoded = None if model is None or SESSION not in model._seen else model._encoded
            return original(features) if encoded is None else encoded

        return forward

    def hear(self, sound: DrivingSound, first: int, frames: int, states: int) -> None:
        """Encode the sound of latent frames `first` .. `first + frames`, unless that is what was encoded last; `states` hidden ones
        before them hear what the first of them does."""
        if self._encoded_of == (wanted := (id(sound), first, frames, states)):
            return
        self._encoded = self._encoded_of = None
        encoder = getattr(self.patcher.model.diffusion_model, _ENCODER)
        weights = F.silu(encoder.weights.detach().float().flatten().cpu())
        heard = sound.of(weights / weights.sum(), first, frames, self._channels)
        made = encoder.encoder(heard.features[None].to(self.device, self.dtype))
        self._encoded = tuple(self._of_frames(one[:, heard.dropped :], states) for one in made)
        self._encoded_of = wanted

    def _of_frames(self, made: torch.Tensor, states: int) -> torch.Tensor:
        """Tokens [1, frames, n, D] for every item and for `states` frames before the first."""
        if states:
            made = torch.cat([made[:, :1].expand(-1, states, -1, -1), made], 1)
        return made.expand(self._batch, -1, -1, -1)

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: MakingReference) -> None:
        """One pass over the tokens of a picture [B, C, 1, h, w] and of the frames before the video [B, C, 19, h, w], at timestep 0;
        the layers keep what `making` wants of it."""
        wan, kind = self.patcher.model.diffusion_model, comfy.ldm.wan.model
        mask = comfy.model_management.cast_to(wan.trainable_cond_mask.weight, dtype=self.dtype, device=self.device)
        shown = wan.patch_embedding(picture.float()).to(self.dtype).flatten(2).transpose(1, 2) + mask[1]
        # its second result are the host's own places, which are others (reference.token_places)
        before = wan.frame_packer(motion.to(self.dtype), wan)[0] + mask[2]
        self._seen = self._options | self._own(making, 0.0)
        try:
            with self.memory.during("reference", self._text_key):
                times = kind.sinusoidal_embedding_1d(wan.freq_dim, torch.zeros(len(shown), device=self.device))
                e = wan.time_embedding(times.to(self.dtype)).unsqueeze(1)
                e = wan.time_projection(e).unflatten(2, (6, wan.dim))
                context = wan.text_embedding(self._context)
                x = torch.cat([shown, before], 1)
                for block in wan.blocks:
                    x = block(x, e=e, freqs=None, context=context, transformer_options=self._seen)
        finally:
            self._seen = self._options

    def _time_key(self, told: float | tuple[float, ...], frames: int) -> Hashable:
        return told, frames  # this forward makes an embedding for every frame

    def _forms(self, spec: RolloutSpec, inside: bool) -> Sequence[PassForm]:
        each = (replace(form, timesteps=form.frames) for form in spec.pass_forms(inside))
        return tuple(dict.fromkeys(each))

    def _forward(self, wan: Any, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The host's forward. Its blocks are reached through a replacement of each, since older hosts do not show them the options;
        a control video of nothing stands for the part that both published pipelines add without one."""
        replaced = {("double_block", i): self._block(block) for i, block in enumerate(wan.blocks)}
        options = self._seen | {"patches_replace": {"dit": replaced}}
        return wan.forward_orig(
            x,
            times,
            self._context,
            audio_embed=None if self._encoded is None else x.new_zeros(1, 1, 1, 1),
            control_video=torch.zeros_like(x),
            freqs=None,
            transformer_options=options,
        )

    def _block(self, block: torch.nn.Module) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, torch.Tensor]]:
        def replacement(args: dict[str, Any], _: dict[str, Any]) -> dict[str, torch.Tensor]:
            out = block(
                args["img"], e=args["vec"], freqs=args["pe"], context=args["txt"], transformer_options=self._seen
            )
            return {"img": out}

        return replacement
