"""Stage 4: consecutive chunks with the anchor in the loop, the gradient running through what one chunk leaves the next.

    python3 run.py train recurrence --config training/configs/recurrence.toml

Content is teacher-forced; the adaptive state is made as at inference and has no target of its own. Each chunk takes
two noisy passes, (A) without gradient from pure noise for the state's x0, (B) at the chunk's own noise level, where
the state is that x0 re-noised, then the clean pass that writes both into the past. At level 1, A is B's own input.
With anchor none or static there is no state and no pass A: the same budget, clips and noise for a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .graph_attention import GraphAttention
from .latents import load
from .loop import drawn_clips, show, train
from .lora import student_of
from .parallel import Workers
from .run import Run
from .student import Student
from .world import CHUNK_LATENTS, LANTERN_CELLS, LANTERN_STATES


@dataclass(frozen=True)
class Draws:
    """Everything random in one step over clips [B, 16, T, h, w]: made for the whole batch, then shared out.

    `content` and `blur` like the clips, `state` [chunks, 2, B, 16, S, h, w] (A's start, B's fresh noise), `sigma` and
    `level` [B, chunks] (noise of the chunk; of its past), `dropped` the parts of the condition left out, `offset` of the cuts.
    """

    content: torch.Tensor
    blur: torch.Tensor
    state: torch.Tensor
    sigma: torch.Tensor
    level: torch.Tensor
    dropped: tuple[bool, ...]
    offset: int

    @staticmethod
    def make(shape: torch.Size, state_frames: int, droppable: int, config: dict, seed: int) -> Draws:
        """Content first, so that every anchor sees the same of it at the same `seed`."""
        batch, channels, frames, rows, columns = shape
        chunks = frames // CHUNK_LATENTS
        g = torch.Generator().manual_seed(seed)
        u, full = torch.rand(batch, chunks, generator=g), torch.rand(batch, chunks, generator=g)
        sigma = torch.where(full < config["full_noise"], 1.0, config["shift"] * u / (1 + (config["shift"] - 1) * u))
        level = torch.rand(batch, chunks, generator=g) * config["blur_most"]
        level = level * (torch.rand(batch, chunks, generator=g) < config["blur_share"])
        dropped = tuple((torch.rand(droppable, generator=g) < config["drop_words"]).tolist())
        offset = int(torch.randint(1 << 16, (1,), generator=g))
        content, blur = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        state = torch.randn(chunks, 2, batch, channels, state_frames, rows, columns, generator=g)
        return Draws(content, blur, state, sigma, level, dropped, offset)

    def to(self, device: torch.device) -> Draws:
        return replace(self, **{n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)})

    def share(self, workers: Workers) -> Draws:
        """What falls to this process, on its device."""
        state = workers.share(self.state.movedim(2, 0)).movedim(0, 2)
        others = {n: workers.share(getattr(self, n)) for n in ("content", "blur", "sigma", "level")}
        return replace(self, state=state, **others).to(workers.device)


class ClipRecurrence(Student):
    """A clip chunk by chunk, with the gradient from chunk to chunk; `forward` gives the squared errors of v."""

    def draws(self, latents: torch.Tensor, config: dict, seed: int) -> Draws:
        """Everything random for these clips."""
        return Draws.make(latents.shape, self.anchor.state_frames, self.texts.droppable, config, seed)

    def forward(
        self,
        latents: torch.Tensor,
        words: torch.Tensor,
        draws: Draws,
        path: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Clips [B, 16, T, h, w] and words [B, chunks, slots] to squared errors of v, [B, chunks, 3, h, w].

        Past content is the clips'. What is denoised is the same content with the draws' noise, or, with `path`, noisy
        clips and the velocity wanted there, both like `latents`.
        """
        session, kept = self.session(latents, draws.offset), self.texts.kept(list(draws.dropped))
        errors = []
        for i in range(latents.shape[2] // CHUNK_LATENTS):
            part = slice(i * CHUNK_LATENTS, (i + 1) * CHUNK_LATENTS)
            context = self.context(words[:, i], kept)
            session.place()
            sigma = draws.sigma[:, i]
            level, blur = sigma[:, None, None, None, None], draws.level[:, i, None, None, None, None]
            clean, noise = latents[:, :, part], draws.content[:, :, part]
            state = self._state_input(noise, draws.state[i], level, context, session)
            noisy, wanted = (1 - level) * clean + level * noise, noise - clean
            if path is not None:
                noisy, wanted = (t[:, :, part] for t in path)
            v = self.velocity(torch.cat([state, noisy], 2), sigma, context, session)
            states = self.anchor.state_frames
            errors.append((v[:, :, states:] - wanted).square().mean(1))
            past = (1 - blur) * clean + blur * draws.blur[:, :, part]
            written = torch.cat([state - level * v[:, :, :states], past], 2)
            self.velocity(written, torch.zeros_like(sigma), context, session)
            session.commit(CHUNK_LATENTS)
        return torch.stack(errors, 1)

    def _state_input(
        self,
        content_noise: torch.Tensor,
        noises: torch.Tensor,
        level: torch.Tensor,
        context: torch.Tensor,
        session: GraphAttention,
    ) -> torch.Tensor:
        """The state at noise `level`: its own x0 after a first step from pure noise, re-noised."""
        start, fresh = noises
        if not self.anchor.state_frames:
            return start
        with torch.no_grad():
            ones = torch.ones_like(level.flatten())
            v = self.velocity(torch.cat([start, content_noise], 2), ones, context, session)
            x0 = start - v[:, :, : self.anchor.state_frames]
        return torch.where(level == 1, start, (1 - level) * x0 + level * fresh)


def figures(errors: torch.Tensor, words: torch.Tensor, sigma: torch.Tensor) -> dict[str, float]:
    """What the log shows: loss of the first and of later chunks, and on the cells of a lantern that has just come back
    with the chunk at (nearly) pure noise, where only a memory knows its colour."""
    later = errors[:, 1:]
    up = words[..., -1] == list(LANTERN_STATES).index("lantern")
    seen = up.cumsum(1) - up.long() > 0
    back = up & ~up.roll(1, 1) & seen & (sigma > 0.95)
    back[:, 0] = False
    rows, columns = LANTERN_CELLS
    cells = errors[:, :, :, rows, columns].mean((2, 3, 4))
    shown = {"returns": cells[back].mean().item()} if bool(back.any()) else {}
    return {"first": errors[:, 0].mean().item(), "later": later.mean().item()} | shown


def main() -> None:
    run = Run.from_arguments("Train the recurrence: chunks in a row with the anchor in the loop.")
    config, workers = run.config, run.workers
    clips = ClipRecurrence(student_of(config).to(run.device), config)
    replicated = workers.replicate(clips)
    latents, words = load(config["train"])
    held_out = load(config["held_out"])

    def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        index = drawn_clips(len(latents), config["batch"], torch.Generator().manual_seed(seed))
        batch = latents[index].float()
        draws = clips.draws(batch, config, seed + 500_000_000).share(workers)
        own = workers.share(words[index])
        errors = replicated(workers.share(batch).to(run.device), own, draws)
        return errors.mean(), figures(errors.detach().cpu(), own, draws.sigma.cpu())

    def look() -> dict[str, float]:
        show(run, held_out[1], latents.shape)
        return evaluate(clips, config, *held_out)

    train(run, clips.model, step, look)


def evaluate(clips: ClipRecurrence, config: dict, latents: torch.Tensor, words: torch.Tensor) -> dict[str, float]:
    """Held-out loss on draws that never change."""
    device = next(clips.parameters()).device
    errors, sigmas = [], []
    for i in range(0, len(latents), 12):
        batch = latents[i : i + 12].float()
        draws = clips.draws(batch, config | {"drop_words": 0.0}, 77 + i)
        errors.append(clips(batch.to(device), words[i : i + 12], draws.to(device)).cpu())
        sigmas.append(draws.sigma)
    held = figures(torch.cat(errors), words, torch.cat(sigmas))
    return {f"held_{name}": value for name, value in held.items()}


if __name__ == "__main__":
    main()
