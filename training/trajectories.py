"""Stage 5a: where the trained recurrence's own ODE leads, chunk by chunk, for the few-step student to learn from.

    python3 run.py train trajectories --config training/configs/trajectories.toml

Past content is the clips' (teacher forcing); each chunk is solved from noise together with its state, by Euler steps
over the shifted noise levels, among which are the student's own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from adastate_core.files.tensor_file import write_tensors
from adastate_core.schedules.schedule import Schedule

from .bare_model import load_denoiser
from .latents import load
from .run import Run
from .student import Student
from .world import CHUNK_LATENTS


@torch.no_grad()
def solve(
    student: Student, latents: torch.Tensor, words: torch.Tensor, schedule: Schedule, keep: int, seed: int
) -> torch.Tensor:
    """[B, keep + 1, 16, T, h, w]: content at every (steps / keep)-th noise level, the first being noise, then its end."""
    generator = torch.Generator().manual_seed(seed)
    states, session = student.anchor.state_frames, student.session(latents)
    every, sigmas = len(schedule.sigmas) // keep, (*schedule.sigmas, 0.0)
    chunks = []
    for i in range(latents.shape[2] // CHUNK_LATENTS):
        clean = latents[:, :, i * CHUNK_LATENTS : (i + 1) * CHUNK_LATENTS]
        context = student.context(words[:, i])
        session.place()
        frames = states + CHUNK_LATENTS
        x = torch.randn(*latents.shape[:2], frames, *latents.shape[3:], generator=generator)
        kept = []
        for step, (sigma, following) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            if step % every == 0:
                kept.append(x[:, :, states:])
            x = x + (following - sigma) * student.velocity(x, x.new_full((len(x),), sigma), context, session)
        kept.append(x[:, :, states:])
        chunks.append(torch.stack(kept, 1))
        written = torch.cat([x[:, :, :states], clean], 2)
        student.velocity(written, x.new_zeros(len(x)), context, session)
        session.commit(CHUNK_LATENTS)
    return torch.cat(chunks, 3)


def paths(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(clip numbers [N], trajectories [N, keep + 1, 16, T, h, w] float16) of all parts in `folder`."""
    parts = [load_file(path) for path in sorted(Path(folder).glob("part_*.safetensors"))]
    if not parts:
        raise SystemExit(f"there are no trajectories in {folder}; run the stage `trajectories` first.")
    return torch.cat([p["clips"] for p in parts]), torch.cat([p["trajectories"] for p in parts])


def main() -> None:
    run = Run.from_arguments("Solve the trained recurrence's ODE for the few-step student.")
    config = run.config
    student = Student(load_denoiser(config["teacher"]), config)
    latents, words = load(config["train"])
    schedule = Schedule.shifted(config["teacher_steps"], config["shift"])
    while run.step < run.steps:
        first = run.step * config["batch"]
        target = run.folder / f"part_{run.step:05d}.safetensors"
        if not target.exists():
            clips = torch.arange(first, first + config["batch"]) % len(latents)
            solved = solve(student, latents[clips].float(), words[clips], schedule, config["rollout_steps"], 9 + first)
            write_tensors(target, {"clips": clips, "trajectories": solved.half()}, {})
        run.advance(clips=first + config["batch"])


if __name__ == "__main__":
    main()
