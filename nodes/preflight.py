"""A rollout that is asked for, with everything about it that can be known before anything is loaded or written."""

from __future__ import annotations

import time

import torch

from ..adastate_core.cache.eight_bits import check_cache_dtype
from ..adastate_core.prompts.plan import PromptChange, PromptPlan
from ..adastate_core.prompts.values import PromptAt, Prompts
from .builder import Request, Subject, build
from .host import model as host_model
from .host import refusals as checks
from .host.codec import HostDecoder
from .host.output_files import check_video_prefix
from .stream_settings import check_streamable


class Prepared:
    """A request resolved against its model: spec, plan, prompts, decoder, given frames, warnings. ValueError, in a sentence,
    for what cannot be rolled out."""

    def __init__(self, request: Request) -> None:
        self.request, self._begun = request, time.monotonic()
        checks.check_model(request.model)
        if request.start_latent is not None:
            checks.check_latent("start_latent", request.start_latent)
        self.family, self.fps = host_model.family_of_model(request.model), request.fps
        self.space = self.family.space
        contexts = self._contexts()
        context = contexts[0][1]
        self.built = build(Subject.of(request.model), request.asked(self.space))
        self.resolved, self.spec, self.schedule = self.built.resolved, self.built.spec, self.built.schedule
        self.settings = self.resolved.numbers
        self.latent_length = self.space.latents(request.length)
        self.warnings = [*self.resolved.warnings(self.latent_length), *self._ignored(), *self.built.told]
        self.model = host_model.HostModel(request.model, context, request.batch_size)
        check_cache_dtype(request.cache_dtype, self.model.device)
        self.prompts = self._prompt_plan(contexts)
        self.solution = request.absorption.solution(self.spec) if request.absorption else None
        self.origin = {"prompt": host_model.prompt_digest(context), "seed": request.seed}
        stream = request.stream
        self.decoder = HostDecoder(stream.vae, latent_space=stream.latent_space) if stream else None
        vae_bytes = self.decoder.cache_bytes(*self.latent_size) if self.decoder else 0
        self.text_tokens = max(one.shape[1] for _, one in contexts)
        self.plan = self.built.plan(self.text_tokens, vae_bytes)
        host_model.check_memory(self.plan, host_model.available_bytes(request.model))
        host_model.check_host_memory(self.plan)
        self.given = self._given()
        self._check_length()

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """B, h, w."""
        return self.spec.batch, self.spec.height, self.spec.width

    def _check_length(self) -> None:
        """Everything about length, start, resume and names that can be known before anything is loaded or written."""
        request, resume = self.request, self.request.resume
        if request.stream is not None:
            check_video_prefix(request.stream.filename_prefix, request.batch_size, request.width, request.height)
        if self.given is not None and self.given.shape[2] >= self.latent_length:
            frames = self.space.pictures(self.given.shape[2])
            raise ValueError(f"start_latent holds {frames} frames of length {request.length}; length must be longer")
        if resume is None:
            return
        if self.given is not None:
            raise ValueError(
                "both resume and start_latent are connected; a state goes on by itself: remove start_latent"
            )
        if differences := self.spec.differences(resume.spec):
            raise ValueError("this state belongs to another rollout: " + "; ".join(differences))
        if resume.emitted >= self.latent_length:
            raise ValueError(
                f"the state holds {self.space.pictures(resume.emitted)} frames and length is {request.length}; length counts from "
                f"the first frame of the video, so give more than {self.space.pictures(resume.emitted)}"
            )
        if request.stream is not None:
            check_streamable(resume, self.decoder)

    def _contexts(self) -> list[tuple[PromptAt | None, torch.Tensor]]:
        """(entry of the timeline, its text embeddings), the first from frame 0; ValueError for what a prompt carries."""
        positive = self.request.positive
        if not isinstance(positive, Prompts):
            return [(None, checks.check_conditioning(positive, self.family))]
        contexts = []
        for entry in positive.entries:
            try:
                contexts.append((entry, checks.check_conditioning(entry.conditioning, self.family)))
            except ValueError as error:
                raise ValueError(f"the prompt at {entry.seconds:g} s: {error}") from error
        return contexts

    def _prompt_plan(self, contexts: list[tuple[PromptAt | None, torch.Tensor]]) -> PromptPlan | None:
        """The changes by latent frame; seconds count at the stream's frames a second, or the latent space's own."""
        if len(contexts) == 1:
            return None
        changes, frame = [], -1
        for entry, context in contexts:
            self.model.check_context(context)
            asked = round(entry.seconds * self.fps / self.space.temporal_stride)
            if asked <= frame:
                raise ValueError(
                    f"the prompt at {entry.seconds:g} s falls on latent frame {asked}, as the one before it; at {self.fps:g} fps "
                    f"prompts must be at least {self.space.seconds(1, self.fps):g} s apart"
                )
            frame = asked
            changes.append(PromptChange(frame, context, entry.transition, entry.chunks, entry.blend))
        return PromptPlan(changes, self.spec.chunk_frames)

    def _ignored(self) -> list[str]:
        """What the inputs carry besides and is not acted on, or nobody knows, a sentence each and each once."""
        positive, start = self.request.positive, self.request.start_latent
        prompts = [entry.conditioning for entry in positive.entries] if isinstance(positive, Prompts) else [positive]
        found = checks.unknown_options(self.request.model)
        found += self.built.sigmas_warnings
        if self.request.absorption is not None and checks.overrides_attention(self.request.model):
            found.append(
                "the model's attention override (optimized_attention_override) is not used in passes that the absorption watches"
            )
        for prompt in prompts:
            found += checks.unknown_conditioning(prompt, self.family)
        found += [] if start is None else checks.unknown_latent("start_latent", start)
        return list(dict.fromkeys(found))

    def _given(self) -> torch.Tensor | None:
        if self.request.start_latent is None:
            return None
        samples = self.request.start_latent["samples"]
        (batch, height, width), space = self.latent_size, self.space
        if (
            samples.ndim != 5
            or samples.shape[1] != space.channels
            or samples.shape[0] not in (1, batch)
            or not samples.shape[2]
        ):
            raise ValueError(
                f"start_latent is {list(samples.shape)}; it must be a {space.name} video latent "
                f"[1 or {batch}, {space.channels}, frames, h, w]: encode pictures with VAE Encode and a {space.name} VAE"
            )
        if tuple(samples.shape[3:]) != (height, width):
            found, wanted = (
                "x".join(str(space.stride * n) for n in hw[::-1]) for hw in (samples.shape[3:], (height, width))
            )
            raise ValueError(
                f"start_latent is {found} and the rollout {wanted}; scale the pictures to the rollout's size before encoding them"
            )
        return host_model.to_model_space(self.request.model, samples.float()).expand(batch, -1, -1, -1, -1)

    def seconds_since_begin(self) -> float:
        """Seconds since the node began to execute."""
        return time.monotonic() - self._begun

    @property
    def holds_latents(self) -> bool:
        """Whether LATENT is wanted: a stream holds no latents unless it is told to."""
        return self.request.keep_latents or self.request.stream is None
