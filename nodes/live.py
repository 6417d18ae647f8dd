"""What a rollout tells whoever watches it, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..adastate_core.prompts import Prompts
from ..adastate_core.rollout import Chunk, Rollout
from ..adastate_core.vae_stream import pictures_of

if TYPE_CHECKING:
    from .job import Job


def chunk_facts(job: Job, number: int, chunk: Chunk, rollout: Rollout) -> dict[str, Any]:
    """JSON-able numbers of the run's chunk `number` (from 0); seconds are seconds of video.

    `seconds` counts from the first frame of the video, `seconds_made` from where this run began.
    """
    request, fps = job.request, job.fps
    before = pictures_of(request.resume.emitted) if request.resume else 0
    frames = pictures_of(rollout.emitted)
    prompt, text = 0, None
    if job.prompts is not None:
        prompt = job.prompts.index(chunk.first_frame)
    if isinstance(request.positive, Prompts):
        text = request.positive.entries[prompt].text or None
    return {
        "chunk": number,
        "given": chunk.given,
        "first_frame": pictures_of(chunk.first_frame),
        "frames": frames,
        "frames_total": pictures_of(request.latent_length),
        "fps": fps,
        "seconds": frames / fps,
        "seconds_made": (frames - before) / fps,
        "seconds_total": pictures_of(request.latent_length) / fps,
        "kv_bytes": rollout.cache.nbytes + rollout.cache.host_nbytes,
        "prompt": prompt,
        "prompt_text": text,
    }


def stop_note(frames: int, asked: int) -> str:
    """For the report of a rollout that was stopped and kept."""
    return f"stopped at frame {frames} of {asked}; run it again for the whole video, or go on from STATE"
