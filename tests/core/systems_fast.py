"""A rollout that is configured from a preset and nothing else."""

from __future__ import annotations

import torch

from adastate_core.history import OWN_LEVEL
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.weights.presets import PRESETS


def spec_of(name, model, *, batch=1, dtype=torch.float32, **changed):
    """The spec of a preset, with single numbers `changed`."""
    one = PRESETS[name]
    numbers = dict(
        chunk_frames=one.chunk_frames, window_frames=one.window_frames, anchor=one.anchor, positions=one.positions,
        blocks=one.blocks, restart_frames=one.restart_frames, overlap_frames=one.overlap_frames,
        shares_window=one.shares_window, one_pass_recache=one.one_pass_recache, remade=one.remade,
        history=one.history, windows=len(one.timesteps) if one.history == OWN_LEVEL else 1,
    )  # fmt: skip
    return RolloutSpec(geometry=model.geometry, batch=batch, height=4, width=6, dtype=dtype, **(numbers | changed))


def rollout_of(name, model, *, seed=7, state=None, prompts=None, on_step=None, **changed):
    settings = Settings(seed, PRESETS[name].schedule)
    spec = spec_of(name, model, **changed)
    return Rollout(model, spec, settings, state=state, prompts=prompts, on_step=on_step)


def latents_of(rollout, length, given=None):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given)], 2)
