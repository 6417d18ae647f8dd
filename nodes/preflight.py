"""A rollout that is asked for, with everything about it that can be known before anything is loaded or written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..adastate_core.anchors import AnchorAdaptive
from ..adastate_core.cache.eight_bits import check_cache_dtype
from ..adastate_core.given import BEFORE, INSIDE
from ..adastate_core.history import check_recaches
from ..adastate_core.prompts.plan import NumberChange, PromptChange, PromptPlan
from ..adastate_core.prompts.values import PromptAt, Prompts
from ..adastate_core.rollout import RolloutState
from ..adastate_core.shot_check import check_shots
from ..adastate_core.states.disk_room import shown_bytes
from ..adastate_core.video.frame_formats import FRAME_FORMATS
from ..adastate_core.video.picture_forms import VALUE_BYTES
from . import endless
from .absorption_budget import with_budget
from .builder import START_MODES, Request, Subject, build
from .course import takes_words, unsaid
from .driven import Reference, check_reference, check_track, driving_sound, length_of, sound_told
from .enlarged_stream import FileForm, check_joined, holds_frame, resume_notes, stream_bytes
from .host import model as host_model
from .host import refusals as checks
from .host.codec import HostDecoder
from .host.frame_folders import output_room
from .host.output_files import check_video_prefix
from .host.speech_model import model_for
from .host.vae_family import check_spaces
from .memory_plan import Beside, host_shortage, memory_plan
from .renewal import Renewal
from .sound import told_at_once
from .stream_settings import check_streamable

NO_LATENT = "The frames went to a stream and keep_latents is off, so there is no LATENT; turn keep_latents on."


@dataclass(frozen=True, eq=False)
class _Context:
    """A prompt's text embeddings, and those of a shot's first chunk where they are others; `entry`: of the timeline, if any."""

    entry: PromptAt | None
    context: torch.Tensor
    opening: torch.Tensor | None = None

    @property
    def embeddings(self) -> list[torch.Tensor]:
        return [self.context] if self.opening is None else [self.context, self.opening]


class Prepared:
    """A request resolved against its model: spec, plan, prompts, decoder, given frames, warnings. ValueError, in a sentence,
    for what cannot be rolled out."""

    def __init__(self, request: Request) -> None:
        self._begun = time.monotonic()
        if request.endless and request.stream is None:
            raise ValueError(endless.NO_STREAM)
        checks.check_model(request.model)
        if request.start_latent is not None:
            checks.check_latent("start_latent", request.start_latent)
        self.family = host_model.family_of_model(request.model)
        self.space = self.family.space
        check_track(request.model, self.family, request.audio)
        check_spaces(self.family, request.start_latent, request.resume, request.stream and request.stream.vae)
        self.request = request = request.sized(self.space)
        contexts = self._contexts()
        context = contexts[0].context
        self.built = build(Subject.of(request.model), request.asked(self.space))
        self.resolved, self.spec, self.schedule = self.built.resolved, self.built.spec, self.built.schedule
        self.settings, self.fps = self.resolved.numbers, self.built.fps
        self.sound = driving_sound(self.family, request.audio, self.resolved.audio, self.fps)
        self.request = request = self._sounding(request.at_rate(self.fps))
        # of a run without an end the most that a video may have: nothing is as long as it
        self.latent_length = self.space.latents(request.length or endless.MOST_FRAMES)
        asked = None if request.endless else self.latent_length
        self.warnings = [*self.resolved.warnings(asked), *self._ignored(), *self.built.told]
        pictures = None if request.endless else self.space.pictures(self.latent_length)
        self.warnings += told_at_once(sound_told(self.sound, pictures, bool(request.stream and request.stream.sound)))
        self.warnings += [endless.LATENTS_OFF] if request.endless and request.keep_latents else []
        self.model = model_for(request.model, context, request.batch_size)
        check_cache_dtype(request.cache_dtype, self.model.device)
        self.prompts = self._prompt_plan(contexts)
        self.solution = request.absorption.solution(self.spec) if request.absorption else None
        self.prior = request.absorption.drawn_towards(self.spec) if request.absorption else None
        self.origin = {"prompt": host_model.prompt_digest(context), "seed": request.seed}
        stream = request.stream
        self.decoder = HostDecoder(stream.vae, latent_space=stream.latent_space, fast=True) if stream else None
        self.form = FileForm.of(stream and stream.enlarging, request.width, request.height, self.fps)
        enlarged = stream is not None and stream.enlarging is not None
        self.enlarger = stream.enlarging.enlarger(request.width, request.height) if enlarged else None
        self.enlarging_models = self.enlarger.describe() if self.enlarger else []
        if self.decoder and request.resume is not None:
            self.warnings += self.decoder.go_on(request.resume.stream)
        vae_bytes = self.decoder.cache_bytes(*self.latent_size) if self.decoder else 0
        self.text_tokens = max(one.shape[1] for words in contexts for one in words.embeddings)
        recaches = self._recaches()
        self.warnings += self.built.recache_told if recaches else []
        self.built = with_budget(self.built, request.model, self.text_tokens, vae_bytes, self.latent_length)
        self.spec = self.built.spec
        self.plan = self.built.plan(
            self.text_tokens,
            vae_bytes,
            self.latent_length,
            self.solution,
            request.resume,
            recaches or takes_words(request.positive),
        )
        host_model.check_memory(self.plan, host_model.available_bytes(request.model))
        host_model.check_host_memory(self.plan, self.model.device)
        self.renewal = Renewal(request.model, self.spec, self.decoder)
        self.memory = memory_plan(self.spec, self.plan, self._beside(), self.model.device.type == "cuda")
        self.warnings += host_shortage(self.memory, host_model.free_host_bytes())
        self.given = self._given()
        self.reference = self._reference()
        self.start = self._start()
        self._check_length()
        self.warnings += [*self._ended(), *self.renewal.notes(), *self._unsaid()]

    def _sounding(self, request: Request) -> Request:
        """The same as long as its sound where that was asked for, and with the sound in its files. Pictures of models that hear a
        chunk alone are ahead of it (audio/driving.py), so the file begins as much later in the sound."""
        track, stream = request.audio, request.stream
        if stream is not None and track is not None and track.sound is not None:
            stream = stream.carrying(track.sound, track.offset + self.sound.ahead)
        length = length_of(request.length, track, self.sound, self.space)
        return replace(request, length=length, stream=stream)

    def steer(self, prompts: Prompts) -> None:
        """Between two chunks: have these prompts instead. ValueError, with all as it was, for what a rollout cannot have."""
        before = self.request
        self.request = replace(before, positive=prompts)
        try:
            self.prompts = self._prompt_plan(self._contexts())
        except BaseException:
            self.request = before
            raise

    def load_again(self) -> None:
        """Between two chunks: have the model on its device, where another model may have taken its room."""
        self.model.load(self.plan, *self._in_turn(), True)

    def _in_turn(self) -> tuple[list[Any], int]:
        """The patchers of what works beside the model, and what the largest of it takes on the device."""
        beside, working = [self.decoder.patcher] if self.decoder else [], self.decoder_bytes
        if self.enlarger is None:
            return beside, working
        return [*beside, *self.enlarger.patchers], max(working, self.enlarger.working_bytes)

    def _unsaid(self) -> list[str]:
        """What the state that is gone on from was steered by, and the prompts do not say."""
        resume = self.request.resume
        return [] if resume is None else unsaid(resume.steered, self.request.positive, self.latent_frame)

    def _recaches(self) -> bool:
        """Whether a recache may come: at a change of the prompt, or because a state's was cut."""
        resume = self.request.resume
        return (self.prompts is not None and self.prompts.recaches) or (resume is not None and resume.again > 0)

    def _beside(self) -> Beside:
        """What the run takes beside its caches, as it is asked for."""
        request, stream = self.request, self.request.stream
        pictures = self.space.temporal_stride * self.spec.chunk_frames
        size = (request.batch_size, request.width, request.height)
        states = "STATE" in request.linked or (
            stream is not None and (stream.autosave_seconds > 0 or stream.keeps_state)
        )
        kept = self.latent_length if self.keeps_latents else 0
        return Beside(
            forward_bytes=host_model.forward_bytes(request.model, self.plan),
            keeps=kept,
            states=states,
            **(
                stream_bytes(self.form, stream.takes, pictures, size, self.decoder_bytes, self.enlarger)
                if stream
                else {}
            ),
        )

    @property
    def chunk_bytes(self) -> int:
        """What a chunk's pictures take on their way to the files of a stream, all items together."""
        pictures = self.space.temporal_stride * self.spec.chunk_frames * self.form.multiplier
        return pictures * self._picture_values * VALUE_BYTES[self.request.stream.takes]

    @property
    def _picture_values(self) -> int:
        """Values of a picture in the files, all items together."""
        return 3 * self.request.batch_size * self.form.width * self.form.height

    @property
    def decoder_bytes(self) -> int:
        """What a chunk's decode takes beside the decoder's cache, or encoding one of its pictures anew if that is more."""
        if self.decoder is None:
            return 0
        return self.decoder.working_bytes(*self.latent_size, encodes=self.renewal.encodes)

    def decoded_from(self, resume: RolloutState) -> int:
        """The first latent frame of a state that is decoded again, its length if its decoder's cache is taken as it is.

        A decoder looks back over so many frames and no further: those before change no bit of what comes."""
        decoder = self.decoder
        if resume.latents is None or ("vae_latents_seen" in resume.stream and not decoder.foreign(resume.stream)):
            return resume.emitted
        reach, first = decoder.reach, self.renewal.first_kept(resume)
        return 0 if reach is None else max(0, first - reach)

    @property
    def looks_back(self) -> bool:
        """Whether in-betweens can be made of the resumed state's last picture and the first new one."""
        resume = self.request.resume
        return resume is not None and (holds_frame(resume.stream) or self.decoded_from(resume) < resume.emitted)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """B, h, w."""
        return self.spec.batch, self.spec.height, self.spec.width

    def _check_length(self) -> None:
        """Everything about length, start, resume and names that can be known before anything is loaded or written."""
        request, resume = self.request, self.request.resume
        if request.stream is not None:
            form = self.form
            for prefix in request.stream.prefixes:
                check_video_prefix(prefix, request.batch_size, form.width, form.height)
            self.warnings += self._room_for_frames()
            request.stream.check_files(form)
            pictures = None if request.endless else self.space.pictures(self.latent_length)
            self.warnings += told_at_once(request.stream.sound_notes(pictures))
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
            frames = self.space.pictures(resume.emitted)
            more = "no video may have more" if request.endless else f"so give more than {frames}"
            raise ValueError(
                f"the state holds {frames} frames and length is {request.length}; length counts from the first frame of the video, "
                f"{more}"
            )
        if request.stream is not None:
            check_streamable(resume, self.decoder)
            self._check_files_of(resume)

    def _check_files_of(self, resume: RolloutState) -> None:
        """ValueError if the new frames cannot be put behind the state's and are to be; what may surprise is a warning."""
        joins = self.request.stream.joins and resume.emitted > 0
        if joins:
            check_joined(resume, self.form, (self.request.width, self.request.height))
        if self.enlarger:
            models = self.enlarging_models
            self.warnings += resume_notes(resume, self.form, models, joins, self.looks_back, self.space)

    def _room_for_frames(self) -> list[str]:
        """ValueError if the disk has no room for a chunk's frames as they are before compression, or for the end of a video without
        one; a sentence if it has none for all frames that are to come, which may become smaller."""
        request, free = self.request, output_room()
        if request.endless:
            if free is not None and free <= (kept := endless.kept_room(self)):
                raise ValueError(
                    f"length is 0, so {shown_bytes(kept)} are kept free for the video's end and its state, and the output folder's "
                    f"disk has {shown_bytes(free)} left; free some room on the disk, or give a length"
                )
            return []
        values, multiplier = self._picture_values, self.form.multiplier
        each = multiplier * sum(values * FRAME_FORMATS[frames.format].value_bytes for frames in request.stream.frames)
        if not each or free is None:
            return []
        begun = 0 if request.resume is None else self.space.pictures(request.resume.emitted)
        chunk, coming = (
            self.space.temporal_stride * self.spec.chunk_frames,
            self.space.pictures(self.latent_length) - begun,
        )
        least = each * min(chunk, coming)
        if least > free:
            raise ValueError(
                f"a chunk's frames take {shown_bytes(least)} before they are compressed, and the output folder's disk has "
                f"{shown_bytes(free)} left; free some room on the disk"
            )
        if each * coming <= free:
            return []
        return [
            f"the frames take up to {shown_bytes(each * coming)}, and the output folder's disk has {shown_bytes(free)} left: if it "
            "fills up, the run ends with what is written, and can be gone on from once there is room"
        ]

    def _ended(self) -> list[str]:
        """What a state of a video whose window shrank, or cannot shrink, means for the one that goes on from it."""
        resume, spec, told = self.request.resume, self.spec, []
        if resume is None:
            return told
        if resume.after:
            told.append(
                f"the state's video ended as published: it goes on from before its window shrank, and its last "
                f"{-(-resume.after // spec.chunk_frames)} chunks are made again"
            )
        if spec.ending != "open" and resume.noisy is not None:
            beyond = resume.next_frame + resume.noisy.shape[2] - spec.chunk_frames
            if beyond >= self.latent_length:
                told.append(
                    f"chunks that the state has under way begin beyond length {self.request.length}, so the video ends open; "
                    f"from {self.space.pictures(beyond + spec.chunk_frames)} on it ends as published"
                )
        return told

    def _contexts(self) -> list[_Context]:
        """Of each prompt, the first from frame 0; ValueError for what one carries."""
        positive, check = self.request.positive, checks.check_conditioning
        if not isinstance(positive, Prompts):
            return [_Context(None, check(positive, self.family))]
        contexts = []
        for entry in positive.worded:
            try:
                opening = None if entry.opening is None else check(entry.opening, self.family)
                contexts.append(_Context(entry, check(entry.conditioning, self.family), opening))
            except ValueError as error:
                raise ValueError(f"the prompt at {entry.seconds:g} s: {error}") from error
        return contexts

    def latent_frame(self, seconds: float) -> int:
        """Where a prompt of a timeline begins; seconds count at the video's frames a second."""
        return round(seconds * self.fps / self.space.temporal_stride)

    def _prompt_plan(self, contexts: list[_Context]) -> PromptPlan | None:
        """The changes by latent frame. ValueError for numbers that this rollout cannot have, or two prompts on one frame."""
        entries = self.request.positive.entries if isinstance(self.request.positive, Prompts) else ()
        if len(entries) < 2 and not any(entry.seed is not None or entry.strength is not None for entry in entries):
            return None
        words, changes, numbers, frame = {one.entry: one for one in contexts}, [], [], -1
        for entry in entries:
            asked = self.latent_frame(entry.seconds)
            if asked <= frame:
                raise ValueError(
                    f"the prompt at {entry.seconds:g} s falls on latent frame {asked}, as the one before it; at {self.fps:g} fps "
                    f"prompts must be at least {self.space.seconds(1, self.fps):g} s apart"
                )
            frame = asked
            if entry in words:
                for one in words[entry].embeddings:
                    self.model.check_context(one)
                context, opening = words[entry].context, words[entry].opening
                changes.append(PromptChange(frame, context, entry.transition, entry.chunks, entry.blend, opening))
            if entry.seed is not None or entry.strength is not None:
                numbers.append(NumberChange(frame, entry.seed, entry.strength))
            if entry.strength is not None and not isinstance(self.spec.anchor, AnchorAdaptive):
                raise ValueError(
                    f"the prompt at {entry.seconds:g} s sets a strength, which is the adaptive anchor's, and this rollout has the "
                    f"{self.spec.anchor.kind} anchor; connect Anchor: Adaptive State, or leave strength out"
                )
        plan = PromptPlan(changes, self.spec.chunk_frames, numbers)
        check_shots(self.spec, plan)
        check_recaches(self.spec.history, plan.recaches)
        return plan

    def _ignored(self) -> list[str]:
        """What the inputs carry besides and is not acted on, or nobody knows, a sentence each and each once."""
        positive, start = self.request.positive, self.request.start_latent
        prompts = [entry.conditioning for entry in positive.worded] if isinstance(positive, Prompts) else [positive]
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
        if samples.ndim != 5 or samples.shape[0] not in (1, batch) or not samples.shape[2]:
            raise ValueError(
                f"start_latent is {list(samples.shape)}; it must be a {space.name} video latent "
                f"[1 or {batch}, {space.channels}, frames, h, w]: encode pictures with VAE Encode and a {space.name} VAE"
            )
        if tuple(samples.shape[3:]) != (height, width):
            found, wanted = (
                "x".join(str(space.stride * n) for n in hw[::-1]) for hw in (samples.shape[3:], (height, width))
            )
            raise ValueError(
                f"start_latent is {found} and the rollout {wanted}; scale the pictures to the rollout's size before encoding them, "
                "or set width and height to 0, which takes their size"
            )
        return host_model.to_model_space(self.request.model, samples.float()).expand(batch, -1, -1, -1, -1)

    def _reference(self) -> Reference | None:
        """What a model that hears shows; None where it is the state's, or for other models."""
        request, vae = self.request, self.request.stream and self.request.stream.vae
        found = check_reference(request.model, self.family, request.reference, self.latent_size, vae)
        if request.resume is None and found is None and self.family.driven_by_sound:
            raise ValueError(
                "the model shows a reference picture and none is connected; connect the picture of who or what is to be seen to "
                "reference"
            )
        if request.resume is not None and found is not None:
            self.warnings.append("the state has a reference of its own, so the one that is connected was not used")
        return None if request.resume is not None else found

    def _start(self) -> str:
        """Where given latents stand, one of given.STARTS; a state's stand where they did. ValueError where they cannot."""
        request, resume = self.request, self.request.resume
        waiting = resume is not None and resume.given is not None
        found = resume.start if waiting else self.resolved.start if request.start == "auto" else request.start
        if request.start not in ("auto", found):
            self.warnings.append(
                f"the state's start latents stand {START_MODES[found]}, as they did, so start_mode was not used"
            )
        elif request.start != "auto" and self.given is None and resume is None:
            self.warnings.append(
                f"start_mode is {START_MODES[request.start]}, and start_latent is not connected, so it was not used"
            )
        if self.given is None and not waiting:
            return BEFORE
        if self.given is not None:
            self.spec.check_given()
        if self.given is not None and found == INSIDE:
            self.spec.check_inside(self.given.shape[2])
        return found

    @property
    def start_told(self) -> dict[str, str]:
        """Where given latents stand, by the input that says it; nothing where there are none that are still to be taken."""
        resume = self.request.resume
        there = self.given is not None or (resume is not None and resume.given is not None)
        return {"start_mode": START_MODES[self.start]} if there else {}

    def seconds_since_begin(self) -> float:
        """Seconds since the node began to execute."""
        return max(0.0, time.monotonic() - self._begun)

    @property
    def no_latent(self) -> str:
        """Why LATENT cannot be had, a sentence: a stream holds no latents unless it is told to. Empty where it can."""
        if self.request.endless:
            return endless.NO_LATENT
        return "" if self.request.keep_latents or self.request.stream is None else NO_LATENT

    @property
    def keeps_latents(self) -> bool:
        """Whether the rollout keeps all its latents, for LATENT, for STATE or for the states that a stream saves."""
        request = self.request
        return request.keep_latents and not request.endless and (bool(request.linked) or request.stream is not None)
