"""A student rolled out on its own output, as a run does it, with the gradient of one step a chunk.

Self-Forcing's stochastic truncation (arXiv 2506.08009): steps before the exit step run without gradient and re-noise, the
exit step's x0 is the chunk, later steps are skipped. The clean pass writes the past; whether a gradient crosses it is
the student's own option. With the last step as exit and no gradient this is the product's rollout
(tests/training/test_distribution_matching.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from adastate_core.schedules.schedule import Schedule
from adastate_core.schedules.solvers import denoised, renoised

from .graph_attention import GraphAttention
from .student import Student

# (chunk, step, frames, is the state) -> standard normal [B, 16, frames, h, w]
Noise = Callable[[int, int, int, bool], torch.Tensor]


class SelfRollout(Student):
    """`forward` gives the content latents of a whole rollout [B, 16, T, h, w] in the model's latent space."""

    def forward(
        self,
        words: torch.Tensor,
        noise: Noise,
        schedule: Schedule,
        exit_step: int,
        offset: int = 0,
        skipped: int = 0,
    ) -> torch.Tensor:
        """`words` [B, chunks, slots]: one rollout each; raises IndexError for an exit step outside the schedule.

        The first `skipped` chunks are made in all steps and without gradient, as at inference, and not given back.
        """
        schedule.sigmas[exit_step]
        out = []
        session = self.session(noise(0, 0, self.config["chunk_frames"], False), offset)
        for chunk in range(words.shape[1]):
            context = self.context(words[:, chunk])
            session.place()
            with torch.set_grad_enabled(torch.is_grad_enabled() and chunk >= skipped):
                sigmas = schedule.sigmas if chunk < skipped else schedule.sigmas[: exit_step + 1]
                x0 = self._denoised(chunk, noise, sigmas, context, session)
                self._write(x0, context, session)
            if chunk >= skipped:
                out.append(x0[:, :, self.anchor.state_frames :])
        return torch.cat(out, 2)

    def _denoised(
        self, chunk: int, noise: Noise, sigmas: Sequence[float], context: torch.Tensor, session: GraphAttention
    ) -> torch.Tensor:
        """x0 of [state | content] after the last of `sigmas`, whose step alone has a gradient."""
        x = self._noise(noise, chunk, 0)
        for step, sigma in enumerate(sigmas):
            last = step == len(sigmas) - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and last):
                x0 = denoised(x, self.velocity(x, x.new_full((len(x),), sigma), context, session), sigma)
            if not last:
                x = renoised(x0, self._noise(noise, chunk, step + 1), sigmas[step + 1])
        return x0

    def _noise(self, noise: Noise, chunk: int, step: int) -> torch.Tensor:
        content = noise(chunk, step, self.config["chunk_frames"], False)
        if not self.anchor.state_frames:
            return content
        return torch.cat([noise(chunk, step, self.anchor.state_frames, True), content], 2)

    def _write(self, x0: torch.Tensor, context: torch.Tensor, session: GraphAttention) -> None:
        """The clean pass: with a graph only if one may cross it, and through the state alone unless the window's may."""
        states, gradients = self.anchor.state_frames, session.gradients
        crosses = gradients.window or (states and gradients.state_writes)
        if not gradients.window:
            x0 = torch.cat([x0[:, :, :states], x0[:, :, states:].detach()], 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(crosses)):
            self.velocity(x0, x0.new_zeros(len(x0)), context, session)
        session.commit(self.config["chunk_frames"])
