"""A rollout that is configured from a preset and nothing else."""

from __future__ import annotations

import torch
from tiny_talking import spoken

from adastate_core.history import CLEAN, OWN_LEVEL
from adastate_core.reference import ReferenceRule
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.weights.presets import PRESETS


def spec_of(name, model, *, batch=1, dtype=torch.float32, **changed):
    """The spec of a preset, with single numbers `changed`."""
    one = PRESETS[name]
    numbers = dict(
        chunk_frames=one.chunk_frames, window_frames=one.window_frames, anchor=one.anchor, positions=one.positions,
        blocks=one.blocks, restart_frames=one.restart_frames, overlap_frames=one.overlap_frames,
        shares_window=one.shares_window, one_pass_recache=one.one_pass_recache, remade=one.remade,
    )  # fmt: skip
    height, width = size_of(name)
    if one.driven_by_sound:
        windows = len(one.schedule.sigmas) if one.history == OWN_LEVEL else 1
        rule = ReferenceRule(one.reference_rolls, drawn=one.history != CLEAN)
        numbers |= {"history": one.history, "windows": windows, "reference": rule}
    return RolloutSpec(
        geometry=model.geometry, batch=batch, height=height, width=width, dtype=dtype, **(numbers | changed)
    )


def size_of(name):
    """Height and width of a latent; a reference's tokens are of at least 8x8."""
    return (8, 8) if PRESETS[name].driven_by_sound else (4, 6)


def rollout_of(name, model, *, seed=7, state=None, prompts=None, on_step=None, **changed):
    """Of a preset that is driven by sound: of a TinyTalking."""
    one, spec, more = PRESETS[name], spec_of(name, model, **changed), {}
    if one.driven_by_sound:
        shape = (spec.batch, model.geometry.channels, 1, spec.height, spec.width)
        more["reference"] = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    sound = spoken(fps=one.fps, alignment=one.audio) if one.driven_by_sound else None
    settings = Settings(seed, one.schedule, sound=sound)
    return Rollout(model, spec, settings, state=state, prompts=prompts, on_step=on_step, **more)


def latents_of(rollout, length, given=None):
    return torch.cat([chunk.latents for chunk in rollout.chunks(length, given)], 2)
