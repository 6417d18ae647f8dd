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
        made = encoded_sound(self.patcher.model.diffusion_model, sound, first, frames, states, self.device, self.dtype)
        self._encoded = tuple(one.expand(self._batch, -1, -1, -1) for one in made)
        self._encoded_of = wanted

    def refer(self, picture: torch.Tensor, motion: torch.Tensor, making: MakingReference) -> None:
        """One pass over the tokens of a picture [B, C, 1, h, w] and of the frames before the video [B, C, 19, h, w], at timestep 0;
        the layers keep what `making` wants of it."""
        wan = self.patcher.model.diffusion_model
        mask = comfy.model_management.cast_to(wan.trainable_cond_mask.weight, dtype=self.dtype, device=self.device)
        self._seen = self._options | self._own(making, 0.0)
        try:
            with self.memory.during("reference", self._text_key):
                pass_over_reference(wan, picture, motion, mask, self._context, self._seen)
        finally:
            self._seen = self._options

    def _time_key(self, told: float | tuple[float, ...], frames: int) -> Hashable:
        return told, frames  # this forward makes an embedding for every frame

    def _forms(self, spec: RolloutSpec, inside: bool) -> Sequence[PassForm]:
        each = (replace(form, timesteps=form.frames) for form in spec.pass_forms(inside))
        return tuple(dict.fromkeys(each))

    def _forward(self, wan: Any, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return speech_forward(wan, x, times, self._context, self._encoded is not None, self._seen)


def encoded_sound(
    wan: Any, sound: DrivingSound, first: int, frames: int, states: int, device: torch.device, dtype: torch.dtype
) -> Pair:
    """What a S2V module's injectors take of the sound of latent frames `first` .. `first + frames`: global tokens
    [1, states + frames, 1, D] and local ones [1, states + frames, 5, D]; `states` frames before the first hear what that does."""
    encoder = getattr(wan, _ENCODER)
    weights = F.silu(encoder.weights.detach().float().flatten().cpu())
    heard = sound.of(weights / weights.sum(), first, frames, encoder.encoder.conv1_local.conv.in_channels)
    made = (one[:, heard.dropped :] for one in encoder.encoder(heard.features[None].to(device, dtype)))
    return tuple(torch.cat([one[:, :1].expand(-1, states, -1, -1), one], 1) if states else one for one in made)


def pass_over_reference(
    wan: Any,
    picture: torch.Tensor,
    motion: torch.Tensor,
    mask: torch.Tensor,
    context: torch.Tensor,
    options: dict[str, Any],
) -> None:
    """The blocks of a S2V module over the tokens of a picture [B, C, 1, h, w] and of the frames before it [B, C, 19, h, w], at
    timestep 0. `mask` [3, D] is what marks tokens, in the dtype that the module computes in."""
    shown = wan.patch_embedding(picture.float()).to(mask.dtype).flatten(2).transpose(1, 2) + mask[1]
    # its second result are the host's own places, which are others (reference.token_places)
    before = wan.frame_packer(motion.to(mask.dtype), wan)[0] + mask[2]
    times = comfy.ldm.wan.model.sinusoidal_embedding_1d(wan.freq_dim, torch.zeros(len(shown), device=mask.device))
    e = wan.time_embedding(times.to(mask.dtype)).unsqueeze(1)
    e = wan.time_projection(e).unflatten(2, (6, wan.dim))
    context = wan.text_embedding(context)
    x = torch.cat([shown, before], 1)
    for block in wan.blocks:
        x = block(x, e=e, freqs=None, context=context, transformer_options=options)


def speech_forward(
    wan: Any, x: torch.Tensor, times: torch.Tensor, context: torch.Tensor, hears: bool, options: dict[str, Any]
) -> torch.Tensor:
    """The host's forward of a S2V module. Its blocks are reached through a replacement of each, since older hosts do not show them
    the options; a control video of nothing stands for the part that both published pipelines add without one."""
    replaced = {("double_block", i): _with_options(block, options) for i, block in enumerate(wan.blocks)}
    return wan.forward_orig(
        x,
        times,
        context,
        audio_embed=x.new_zeros(1, 1, 1, 1) if hears else None,
        control_video=torch.zeros_like(x),
        freqs=None,
        transformer_options=options | {"patches_replace": {"dit": replaced}},
    )


def _with_options(
    block: torch.nn.Module, options: dict[str, Any]
) -> Callable[[dict[str, Any], dict[str, Any]], dict[str, torch.Tensor]]:
    def replacement(args: dict[str, Any], _: dict[str, Any]) -> dict[str, torch.Tensor]:
        out = block(args["img"], e=args["vec"], freqs=args["pe"], context=args["txt"], transformer_options=options)
        return {"img": out}

    return replacement
