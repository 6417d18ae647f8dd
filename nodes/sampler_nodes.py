"""AdaState Sampler: the rollout as a SAMPLER of the host, and the rollout's noise as a NOISE."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..adastate_core.anchors import Anchor
from ..adastate_core.rollout import Rollout, RolloutSpec, Settings
from ..adastate_core.schedules.noise import noise
from .builder import Asked, Built, Subject, build
from .defaults import preset_of
from .host import guider as host_sampler
from .host import model as host_model
from .host.api import io, schema
from .host.node import Node
from .host.progress import check_interrupt
from .inputs import number, require_multiples
from .rollout_node import RolloutNode

log = logging.getLogger("adastate")
CATEGORY = "AdaState/sampling"
_SHARED_INPUTS = ("chunk_frames", "window_frames", "positions", "anchor")


class _Watch:
    """Lets interrupts through before every pass and tells the host's callback of every pass that is done, of `total`.

    `latents` [B, C, T, h, w]: what there is so far, zero where nothing has been made yet.
    """

    def __init__(self, callback: Callable[..., None] | None, latents: torch.Tensor, spec: RolloutSpec):
        self.callback, self.latents, self.spec = callback, latents, spec
        self.begun = self.total = 0

    def __call__(self, chunk: int, step: int, steps: int, x0: torch.Tensor | None) -> None:
        """A rollout's StepCallback."""
        check_interrupt()
        if x0 is not None:
            start, content = chunk * self.spec.chunk_frames, x0[:, :, self.spec.anchor.state_frames :]
            part = self.latents[:, :, start : start + self.spec.chunk_frames]
            part.copy_(content[:, :, : part.shape[2]])
        self.done(self.begun)
        self.begun += 1

    def done(self, passes: int) -> None:
        if self.callback is not None and passes:
            self.callback(passes - 1, self.latents, self.latents, self.total)


@dataclass(frozen=True)
class RolloutSampler(host_sampler.Sampler):
    """A SAMPLER that rolls the guider's model out over an empty latent; 0, -1 and "auto" mean the checkpoint's wish."""

    chunk_frames: int = 0
    window_frames: int = -1
    positions: str = "auto"
    anchor: Anchor | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """Latents [B, C, T, h, w] float32 in the model's space, T that of `noise`; called by the host's guiders.

        Raises ValueError for what a rollout cannot honour, before the caches are allocated.
        """
        context = host_sampler.check_guider(model_wrap, extra_args)
        patcher, options = model_wrap.model_patcher, extra_args["model_options"]
        family = host_model.family_of_model(patcher)
        host_sampler.check_latents(family, noise, latent_image, denoise_mask)
        require_multiples(family.space, *(family.space.stride * side for side in noise.shape[:-3:-1]))
        built = self._built(patcher, sigmas, noise.shape)
        spec, model = built.spec, host_sampler.GuidedModel(patcher, context, noise.shape[0], options)
        told = [*host_sampler.unknown(model_wrap, options), *built.resolved.warnings(noise.shape[2]), *built.told]
        for warning in (*told, *built.sigmas_warnings):
            log.warning("AdaState Sampler: %s", warning)
        text_tokens = context.shape[1]
        plan = built.plan(text_tokens, length=noise.shape[2])
        host_model.check_memory(plan, host_model.available_bytes(patcher))
        model.load(plan)
        latents = torch.zeros(noise.shape, dtype=torch.float32, device=noise.device)
        watch = _Watch(callback, latents, spec)
        settings = Settings(extra_args.get("seed") or 0, built.schedule, first_noise=noise.float().cpu())
        with host_model.attention_in_place(patcher, model.memory):
            model.fuse(spec, plan, told=lambda done, total: check_interrupt())
            rollout = Rollout(model, spec, settings, text_tokens=text_tokens, on_step=watch, length=noise.shape[2])
            watch.total = rollout.passes(noise.shape[2])
            try:
                for chunk in rollout.chunks(noise.shape[2]):
                    first, made = chunk.first_frame, chunk.latents
                    latents[:, :, first : first + made.shape[2]] = made.to(latents)
            finally:
                rollout.close()
        watch.done(watch.total)
        return latents

    def _built(self, patcher: Any, sigmas: torch.Tensor, shape: torch.Size) -> Built:
        """The rollout that this sampler makes of latents of `shape` [B, C, T, h, w]; ValueError for a preset whose rollout is
        more than one chunk after the other."""
        asked = Asked(
            batch=shape[0], height=shape[3], width=shape[4], chunk_frames=self.chunk_frames, window_frames=self.window_frames,
            positions=self.positions, anchor=self.anchor, sigmas=sigmas,
        )  # fmt: skip
        subject = Subject.of(patcher, identified=False)
        preset = preset_of(subject.wishes)
        if preset is not None and (preset.blocks > 1 or preset.restart_frames):
            how = (
                f"denoises {preset.blocks} chunks together"
                if preset.blocks > 1
                else f"starts afresh every {preset.restart_frames} latent frames"
            )
            raise ValueError(
                f"the model is to be rolled out as {preset.title} (preset {preset.name}), which {how}, and this sampler cannot: "
                "use AdaState Rollout, or choose another preset in Model Preset"
            )
        return build(subject, asked)


class SamplerNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = {i.id: i for i in RolloutNode.define_schema().inputs}
        return schema(
            node_id="AdaStateSampler",
            display_name="AdaState Sampler",
            category=CATEGORY,
            description="The rollout as a sampler for SamplerCustomAdvanced: guider, noise, sigmas and latent are the host's.",
            search_aliases=["autoregressive", "ar video", "self forcing", "causal", "AdaState"],
            inputs=[shared[name] for name in _SHARED_INPUTS],
            outputs=[
                io.Sampler.Output(
                    "sampler", display_name="SAMPLER", tooltip="For SamplerCustomAdvanced, with a guider of cfg 1."
                )
            ],
        )

    @classmethod
    def execute(
        cls, chunk_frames: int, window_frames: int, positions: str, anchor: Anchor | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(RolloutSampler(chunk_frames, window_frames, positions, anchor))


@dataclass(frozen=True)
class RolloutNoise:
    """A NOISE: what AdaState Rollout starts its chunks from."""

    seed: int
    chunk_frames: int

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """[B, C, T, h, w] float32 on the CPU for a LATENT of that shape; ValueError if it is not a video."""
        samples = input_latent["samples"]
        if samples.is_nested or samples.ndim != 5:
            raise ValueError(
                "AdaState Noise is for video latents [batch, channels, frames, h, w]; connect an empty one"
            )
        if input_latent.get("batch_index") is not None:
            log.warning("AdaState Noise: the latent carries batch_index, which a rollout's noise does not use")
        batch, channels, frames, height, width = samples.shape
        shape = (batch, channels, self.chunk_frames, height, width)
        drawn = [noise(self.seed, chunk, 0, shape) for chunk in range(-(-frames // self.chunk_frames))]
        return torch.cat(drawn, dim=2)[:, :, :frames]


class NoiseNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateNoise",
            display_name="AdaState Noise",
            category=CATEGORY,
            description="The noise of AdaState Rollout for AdaState Sampler: the same seed then gives the same video in both.",
            search_aliases=["noise", "seed", "AdaState"],
            inputs=[
                number(
                    io.Int,
                    "seed",
                    default=0,
                    control_after_generate=True,
                    tooltip="The seed of the rollout.",
                ),
                number(
                    io.Int,
                    "chunk_frames",
                    auto=False,
                    default=3,
                    tooltip="Latent frames that the sampler makes at once: most checkpoints want 3, frame-wise ones 1.",
                ),
            ],
            outputs=[io.Noise.Output("noise", display_name="NOISE", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, seed: int, chunk_frames: int) -> io.NodeOutput:
        return io.NodeOutput(RolloutNoise(seed, chunk_frames))


NODES = [SamplerNode, NoiseNode]
