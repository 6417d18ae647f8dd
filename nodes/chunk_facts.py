"""What a rollout tells whoever watches it, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch

from ..adastate_core.absorption.settings import PHASES
from ..adastate_core.prompts.entry_options import SHOT
from ..adastate_core.prompts.values import Prompts
from ..adastate_core.rollout import Chunk, Rollout
from .host import model as host_model
from .preflight import Prepared

STATE_SIDE = 160  # pixels: the most that a picture of the hidden state is wide and high
_MOST_PROMPTS, _LONGEST_TEXT = 240, 500


def run_facts(job: Prepared, stream: str | None) -> dict[str, Any]:
    """JSON-able: what is known of a run before its first chunk. Of prompts the first 240, of each at most 500 characters.

    `stream` is the id of the run's stream, if it has one; `continues` that of the stream whose state it goes on from.
    """
    request, prompts = job.request, []
    if isinstance(request.positive, Prompts):
        prompts = [
            {"seconds": entry.seconds, "text": entry.text[:_LONGEST_TEXT], "transition": entry.transition}
            for entry in request.positive.worded[:_MOST_PROMPTS]
        ]
    return {
        "seed": request.seed,
        "length": request.length,
        "fps": job.fps,
        "first_frame": job.space.pictures(request.resume.emitted) if request.resume else 0,
        "history_chunks": request.stream.history_chunks if request.stream else 0,
        "keeps_state": request.stream.keeps_state if request.stream else False,
        "stream": stream,
        "continues": request.resume.stream.get("run_id") if request.resume else None,
        "prompts": prompts,
    }


def hidden_picture(job: Prepared, hidden: torch.Tensor) -> torch.Tensor:
    """The newest frame of item 0 of a hidden state [B, C, S, h, w] (model space) as a small picture [h, w, 3] in 0..1.

    Large latents are averaged down before they are decoded, which costs little whatever the size of the video.
    """
    latent = host_model.to_vae_space(job.request.model, hidden[:1, :, -1:])
    factor = -(-max(latent.shape[3:]) * job.space.stride // STATE_SIDE)
    if factor > 1:
        latent = torch.nn.functional.avg_pool2d(latent[:, :, 0].float(), factor, ceil_mode=True)[:, :, None]
    return job.decoder.another().step(latent)[0, -1]


def chunk_facts(
    job: Prepared, number: int, chunk: Chunk, rollout: Rollout, autosave: dict[str, Any] | None = None
) -> dict[str, Any]:
    """JSON-able numbers of the run's chunk `number` (from 0); seconds are seconds of video. Totals are None where it has no end.

    `seconds` counts from the first frame of the video, `seconds_made` from where this run began. `autosave` is what the run's
    stream says of its autosaves.
    """
    request, fps = job.request, job.fps
    before = job.space.pictures(request.resume.emitted) if request.resume else 0
    frames = job.space.pictures(rollout.emitted)
    total = None if request.endless else job.space.pictures(job.latent_length)
    prompt, text, shot = 0, None, False
    if job.prompts is not None:
        first = chunk.first_frame
        prompt = job.prompts.index(first)
        shot = job.prompts.transition(first, first - job.spec.chunk_frames) == SHOT
    if isinstance(request.positive, Prompts):
        text = request.positive.worded[prompt].text or None
    return {
        "chunk": number,
        "given": chunk.given,
        "first_frame": job.space.pictures(chunk.first_frame),
        "frames": frames,
        "frames_total": total,
        "fps": fps,
        "seconds": frames / fps,
        "seconds_made": (frames - before) / fps,
        "seconds_total": None if total is None else total / fps,
        "generated": rollout.generated,
        "absorbed": rollout.absorber is not None and rollout.absorber.phase == PHASES[1],
        "absorbed_why": rollout.absorber.why if rollout.absorber is not None else "",
        "kv_bytes": rollout.past.nbytes,
        "prompt": prompt,
        "prompt_text": text,
        "shot": shot,
        "autosave": autosave or None,
    }


def stop_note(frames: int, asked: int, limit: float | None) -> str:
    """For the report of a rollout that was stopped and kept, by the user or by a `limit` in seconds."""
    why = "" if limit is None else f" because max_seconds ({limit:g}) had passed"
    return f"stopped at frame {frames} of {asked}{why}; run it again for the whole video, or go on from STATE"
