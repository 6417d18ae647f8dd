"""Rollouts of tiny random models on the host's device, against the same ones by a plain twin on the CPU and against each other."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...adastate_core.absorption.settings import AbsorptionSettings
from ...adastate_core.rollout import RolloutState
from ...adastate_core.states.state_file import load_state, save_state
from ..absorption_request import AbsorptionRequest
from ..builder import Request
from ..host import made_models as made
from ..host.model import compute_dtype
from ..host.progress import check_interrupt
from ..host.safely import Interrupted
from ..job import Job
from .bench import Bench, Rolled, by_the_twin, distance, long_enough, near, rolled, same_bits, way_of_blocks
from .outcome import Outcome, judged

# of float32 latents; on a CPU 1e-6 was seen, and 0.1 for a rollout without its anchor
FLOAT_APART = 1e-3
# of the demo in a dtype of 16 bits, whose rounding every step carries on
HALF_APART = 0.15
# on a CPU 0.007 and 0.02 were seen
STORED_APART = {"int8": 0.03, "fp8": 0.1}


def preset(bench: Bench, name: str) -> Outcome:
    """A system's rules, until two chunks after the first frame has left the cache: latents, bytes, and stop and resume."""
    request, frames = long_enough(bench.request(name))
    spec = Job(request).spec
    whole = rolled(bench, request, state_at=frames - (1 + spec.blocks) * spec.chunk_frames)
    return judged(
        [
            near(whole.latents, by_the_twin(whole.job, bench.twin_for(name)), FLOAT_APART, "the CPU"),
            whole.bytes_are_planned(),
            _resumed(bench, request, whole),
        ]
    )


def _resumed(bench: Bench, request: Request, whole: Rolled) -> tuple[bool, str]:
    """The rest of a video from a state that went through a file, against the video that never stopped."""
    state = through_a_file(whole.state)
    rest = rolled(bench, replace(request, resume=state)).latents
    return same_bits(rest, whole.latents[:, :, state.emitted :], "resumed")


def through_a_file(state: RolloutState) -> RolloutState:
    """What is read of a state that was saved."""
    with tempfile.TemporaryDirectory() as folder:
        return load_state(save_state(state, Path(folder) / "self_test.state.safetensors"))


def demo(bench: Bench) -> Outcome:
    """The shipped model in the dtype that the host chooses, against the CPU in float32."""
    weights = made.demo_weights()
    request, frames = long_enough(bench.demo_request())
    whole = rolled(bench, request, state_at=frames - 6)
    dtype = compute_dtype(request.model)
    twin = made.PlainWan(_shape_of(weights), weights, request.positive[0][0])
    most = FLOAT_APART if dtype == torch.float32 else HALF_APART
    name = str(dtype).removeprefix("torch.")
    return judged(
        [
            near(
                whole.latents,
                by_the_twin(whole.job, twin),
                most,
                f"the CPU's float32, in {name}, {way_of_blocks(whole.job)}",
            ),
            whole.bytes_are_planned(),
            _resumed(bench, request, whole),
        ]
    )


def _shape_of(weights: dict[str, torch.Tensor]) -> made.Shape:
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    feed_forward, width = weights["blocks.0.ffn.0.weight"].shape
    return made.Shape(width, feed_forward, layers)


def interrupt(bench: Bench, name: str) -> Outcome:
    """An interrupt before, amid and at the end of a chunk: what is kept goes on to the bits of the whole."""
    request, _ = long_enough(bench.request(name))
    whole, found = rolled(bench, request), []
    passes = len(whole.job.schedule.sigmas) + 1
    chunk = passes * (whole.rollout.generated - 2)
    for place, at in (("first pass", chunk), ("middle", chunk + passes // 2), ("clean pass", chunk + passes - 1)):
        state, first = _interrupted(bench, request, at)
        rest = rolled(bench, replace(request, resume=state)).latents
        good, seen = same_bits(torch.cat([first, rest], 2), whole.latents, "resumed")
        found.append((good, f"at the {place} {seen}"))
    return judged(found)


def _interrupted(bench: Bench, request: Request, at: int) -> tuple[RolloutState, torch.Tensor]:
    """(the state, the latents) that a run leaves which the host's interrupt ends before its forward number `at`."""
    job, left, parts = Job(request), [at], []
    rollout = bench.started(job)

    def step(*_: Any) -> None:
        check_interrupt()
        if not left[0]:
            raise Interrupted()
        left[0] -= 1

    rollout.on_step = step
    try:
        for chunk in rollout.chunks(job.latent_length):
            parts.append(chunk.latents.detach().cpu())
    except Interrupted:
        if left[0]:  # it is the user's own
            raise
        return rollout.snapshot(), torch.cat(parts, 2)
    raise RuntimeError(f"the rollout came to its end where it had to be interrupted before its forward {at}")


def storage(bench: Bench, cache_dtype: str, cache_device: str) -> Outcome:
    """A past in 8 bits or in host memory against a plain one: host memory changes no bit, 8 bits no more than their rounding."""
    request, frames = long_enough(bench.request("longlive"))
    stored = replace(request, cache_dtype=cache_dtype, cache_device=cache_device)
    here = rolled(bench, replace(request, cache_dtype=cache_dtype))
    there = rolled(bench, stored, state_at=frames - 6) if cache_device != "gpu" else here
    found = [there.bytes_are_planned()]
    if cache_device != "gpu":
        found += [same_bits(there.latents, here.latents, "as on the device"), _resumed(bench, stored, there)]
    if cache_dtype != "model":
        found.append(near(here.latents, rolled(bench, request).latents, STORED_APART[cache_dtype], "the plain past"))
    return judged(found)


def absorption(bench: Bench) -> Outcome:
    """Half the layers without their history: solved and switched as on the CPU, in fewer bytes, and resumed."""
    settings = AbsorptionSettings(ratio=0.5, warmup_frames=24, local_window_frames=6)
    request = bench.request("self_forcing", length=133, absorption=AbsorptionRequest(settings))
    whole = rolled(bench, request, state_at=27)
    report = whole.rollout.absorber.report()
    switched = report["phase"] == "switched" and len(report["layers"]) == 1
    plain = rolled(bench, replace(request, absorption=None)).latents
    return judged(
        [
            (switched, f"{report['phase']}, layers {report['layers']}"),
            near(whole.latents, by_the_twin(whole.job, bench.plain), FLOAT_APART, "the CPU"),
            (distance(whole.latents, plain) > 0, "it is another video than with all history"),
            whole.bytes_are_planned(),
            _resumed(bench, request, whole),
        ]
    )
