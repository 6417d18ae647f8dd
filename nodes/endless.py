"""Length 0: a rollout that goes on until somebody stops it. What it says of itself, and the room on the disk that it keeps.

Nobody knows where such a video ends, so all that would grow with it is left out: no latents are kept, and the disk is looked at
after every chunk, so that what the end takes always has room.
"""

from __future__ import annotations

from typing import Any

from ..adastate_core.bounds import BOUNDS
from ..adastate_core.states.state_size import most_file_bytes
from .host import queued

MOST_FRAMES = int(BOUNDS["length"].most)
LATENT = 0  # the output of AdaState Rollout
# by what it is stopped when it is as long as it was wanted, so that it is not rolled once more where the same is asked for again
WANTED = ("user", "max_seconds", "file", "most")
# a stream writes at most two chunks behind, and one more is made before the disk is looked at again
_CHUNKS_AHEAD = 3
# what others may write to the disk meanwhile
_FOR_OTHERS = 2**26

_UNTIL_STOPPED = "length is 0, which rolls until it is stopped"
NO_STREAM = (
    f"{_UNTIL_STOPPED}, and that needs a stream to take the frames: connect Stream To Video or Stream To Frames to stream, or give "
    "a length"
)
LATENT_LINKED = (
    f"{_UNTIL_STOPPED} and keeps no latents, but LATENT is linked: take that link away and use VIDEO, or give a length"
)
NO_LATENT = "The rollout had length 0, which keeps no latents, so there is no LATENT; use VIDEO, or give a length."
LATENTS_OFF = "length is 0, so keep_latents counts as off"


def refused_when_queued() -> str | None:
    """Why the node at work, whose length is 0, cannot roll as the prompt that is being queued links it; None where it can, or
    where nobody knows that prompt."""
    if queued.feeds("stream") is False:
        return NO_STREAM
    return LATENT_LINKED if LATENT in queued.linked_slots() else None


def chunks_ahead(job: Any) -> int:
    """Bytes of the chunks that are made before a run (a Prepared) can stop, in one file, before compression."""
    return _CHUNKS_AHEAD * job.chunk_bytes


def kept_room(job: Any) -> int:
    """Bytes of the disk that a run (a Prepared) keeps for its end, beside what its files have yet to be written: chunks that are
    made before it can stop, its last state, and what is not its own."""
    stream = job.request.stream
    files = len(stream.frames) + stream.video
    return chunks_ahead(job) * files + most_file_bytes(job.spec, job.plan) + _FOR_OTHERS


def stop_note(frames: int, by: str, max_seconds: float, full: str) -> str:
    """For the report of such a rollout; `by` is what the report's `stopped` says, `full` a sentence about the disk."""
    why = {
        "max_seconds": f" because max_seconds ({max_seconds:g}) had passed",
        "disk": f" because {full}",
        "file": f" because {full}",
        "most": f" because a video may have {MOST_FRAMES} frames",
    }
    return f"stopped at frame {frames} of a video without an end{why.get(by, '')}; go on from its state"
