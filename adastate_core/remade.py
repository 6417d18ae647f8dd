"""A past that is made anew before every chunk, so that no cache outlives one (Krea Realtime).

Before every chunk but the video's first, past latents pass the network as clean ones, chunk by chunk and alone; the chunk then
sees what this pass made of them, and no clean pass follows it. Which latents, of F frames a chunk and a window of W:

- while the video has at most W frames, all of them;
- up to the chunk that has W generated frames behind its predecessor, frame 0 and the newest W - 1;
- then the newest W, the oldest of which is encoded anew: the last of its pictures, alone, as a video of one picture is. Where
  nobody can do that, its latent is taken.

"first" goes on with frame 0 and the newest W - 1 for good, which asks for no encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .spec import RolloutSpec
from .standing import Standing

# a latent frame of the video, as its last picture encoded alone [B, C, 1, h, w] float32 in the model's space; or None
Renewed = Callable[[int], torch.Tensor | None]


def _begins_anew(spec: RolloutSpec, next_chunk: int) -> bool:
    """Whether the past of generated chunk `next_chunk` begins with a frame that is encoded anew, if it has more than W frames."""
    return spec.remade == "newest" and (next_chunk - 1) * spec.chunk_frames >= spec.window_frames > 0


def renewed_frames(spec: RolloutSpec, next_frame: int, next_chunk: int) -> tuple[int, ...]:
    """The latent frames before `next_frame` that are to be encoded anew for the next chunks, the first of them for the next one."""
    if spec.remade != "newest" or not spec.window_frames:
        return ()
    found, frame, chunk = [], next_frame, next_chunk
    while frame - spec.window_frames < next_frame:
        if _begins_anew(spec, chunk) and frame > spec.window_frames:
            found.append(frame - spec.window_frames)
        frame, chunk = frame + spec.chunk_frames, chunk + 1
    return tuple(found)


def past_latents(spec: RolloutSpec, now: Standing, renewed: Renewed | None) -> torch.Tensor:
    """The latents [B, C, n, h, w] that the next chunk's past is made of, oldest first; n may be 0."""
    held, window = now.recent.shape[2], spec.window_frames
    if now.next_frame <= window:
        return now.recent[:, :, held - now.next_frame :]
    newest = now.recent[:, :, held - window :]
    if not window:
        return newest
    if not _begins_anew(spec, now.next_chunk):
        return torch.cat([now.first, newest[:, :, 1:]], 2)
    lone = renewed(now.next_frame - window) if renewed is not None else None
    return newest if lone is None else torch.cat([lone.to(newest), newest[:, :, 1:]], 2)


def passes_before(spec: RolloutSpec, frame: int) -> int:
    """Forwards that the past of a chunk takes that begins at `frame`."""
    return -(-min(spec.window_frames, frame) // spec.chunk_frames) if spec.remade else 0


def passes(spec: RolloutSpec, frame: int, chunks: int) -> int:
    """Forwards that the pasts of so many chunks from `frame` on take."""
    taken = 0
    while chunks and frame < spec.window_frames:
        taken, frame, chunks = taken + passes_before(spec, frame), frame + spec.chunk_frames, chunks - 1
    return taken + chunks * passes_before(spec, frame)
