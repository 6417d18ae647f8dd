"""Does anything remember the lantern? Its colour is in no condition, and after a gap it is in no window either.

Teacher-forced: true content is the past, the state is made as a run makes it. In front of every chunk the lantern is
asked for once, on a branch that leaves no trace; the four latent cells it fills tell which colour came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from adastate_core.prompts.demo_words import VOCABULARY
from adastate_core.schedules.noise import noise
from adastate_core.schedules.schedule import Schedule
from adastate_core.schedules.solvers import denoised, renoised

from .graph_attention import GraphAttention
from .latents import encode, word_numbers
from .student import Student
from .world import CHUNK_LATENTS, LANTERN_CELLS, LANTERN_COLOURS, LANTERN_STATES, Scene

UP, DOWN = LANTERN_STATES
COLOURS = tuple(LANTERN_COLOURS)
SHOWN = 1  # the only chunk with a lantern in it


def lantern_scenes(count: int, seed: int, chunks: int) -> list[Scene]:
    """Scenes whose lantern is up in chunk 1 alone, every colour equally often."""
    states = tuple(UP if i == SHOWN else DOWN for i in range(chunks))
    drawn = [Scene.draw(torch.Generator().manual_seed(seed + i), chunks, states) for i in range(count)]
    return [replace(scene, lantern_colour=COLOURS[i % len(COLOURS)]) for i, scene in enumerate(drawn)]


def encoded(scenes: list[Scene], chunks: int, encoder: Callable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents [N, 16, T, h, w], words [N, chunks, slots], colour numbers [N])."""
    latents = torch.stack([encode(encoder, scene, chunks) for scene in scenes])
    words = torch.stack([word_numbers(scene, chunks) for scene in scenes])
    return latents, words, torch.tensor([COLOURS.index(scene.lantern_colour) for scene in scenes])


class ColourJudge:
    """Nearest of the four colours' mean latents, in the lantern's cells of a chunk's last two frames."""

    def __init__(self, latents: torch.Tensor, colours: torch.Tensor) -> None:
        """Learns from chunks [N, 16, 3, h, w] that show a lantern of known colour [N]."""
        features = self._features(latents)
        self.means = torch.stack([features[colours == c].mean(0) for c in range(len(COLOURS))])

    @staticmethod
    def _features(chunk: torch.Tensor) -> torch.Tensor:
        rows, columns = LANTERN_CELLS
        return chunk[:, :, 1:, rows, columns].mean(2).flatten(1)

    def __call__(self, chunk: torch.Tensor) -> torch.Tensor:
        """[N, 16, 3, h, w] to colour numbers [N]."""
        return torch.cdist(self._features(chunk), self.means).argmin(1)


def sampled(student: Student, session: GraphAttention, words: torch.Tensor, schedule: Schedule, chunk: int, seed: int):
    """x0 [N, 16, S + 3, h, w] of one chunk by the product's sampler; the session's past stays as it is."""
    context, states = student.context(words), student.anchor.state_frames
    session.place()
    x0 = None
    for step, sigma in enumerate(schedule.sigmas):
        size = (len(words), 16)
        fresh = noise(seed, chunk, step, (*size, CHUNK_LATENTS, *session.latent_size))
        if states:
            fresh = torch.cat([noise(seed, chunk, step, (*size, states, *session.latent_size), True), fresh], 2)
        x = fresh if x0 is None else renoised(x0, fresh, sigma)
        x0 = denoised(x, student.velocity(x, x.new_full((len(x),), sigma), context, session), sigma)
    return x0


@contextmanager
def exchanged(session: GraphAttention, part: str) -> Iterator[None]:
    """Within: every stream has its neighbour's `part` ("anchor" or "window") of the past."""
    kept = [(layer.anchor, layer.window) for layer in session.layers]

    def neighbour(frame):
        return replace(frame, key=frame.key.roll(1, 0), value=frame.value.roll(1, 0))

    for layer in session.layers:
        if part == "anchor":
            layer.anchor = {slot: neighbour(frame) for slot, frame in layer.anchor.items()}
        else:
            layer.window = [neighbour(frame) for frame in layer.window]
    try:
        yield
    finally:
        for layer, (anchor, window) in zip(session.layers, kept, strict=True):
            layer.anchor, layer.window = anchor, window


@torch.no_grad()
def recall(
    student: Student,
    latents: torch.Tensor,
    words: torch.Tensor,
    colours: torch.Tensor,
    judge: ColourJudge,
    schedule: Schedule,
    seed: int,
) -> dict[str, dict[int, float]]:
    """Shares of streams by gap (chunks without a lantern in between).

    `own`: the stream's own colour came; with an anchor exchanged between neighbours, `swapped anchor donor` and
    `swapped anchor own`; likewise for the window. Neighbours differ in colour.
    """
    session = student.session(latents)
    asked = words[:, SHOWN].clone()
    asked[:, -1] = VOCABULARY["lantern"].index(UP)
    shares: dict[str, dict[int, float]] = {}

    def note(name: str, gap: int, right: torch.Tensor) -> None:
        shares.setdefault(name, {})[gap] = right.float().mean().item()

    def ask(chunk: int) -> torch.Tensor:
        return judge(sampled(student, session, asked, schedule, chunk, seed)[:, :, student.anchor.state_frames :])

    for chunk in range(words.shape[1]):
        gap = chunk - SHOWN - 1
        if gap >= 0:
            note("own", gap, ask(chunk) == colours)
            for part in ("anchor", "window") if student.anchor.state_frames else ():
                with exchanged(session, part):
                    came = ask(chunk)
                note(f"swapped {part}: donor", gap, came == colours.roll(1))
                note(f"swapped {part}: own", gap, came == colours)
        x0 = sampled(student, session, words[:, chunk], schedule, chunk, seed + 1)
        true = latents[:, :, chunk * CHUNK_LATENTS : (chunk + 1) * CHUNK_LATENTS]
        written = torch.cat([x0[:, :, : student.anchor.state_frames], true], 2)
        student.velocity(written, written.new_zeros(len(written)), student.context(words[:, chunk]), session)
        session.commit(CHUNK_LATENTS)
    return shares
