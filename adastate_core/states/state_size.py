"""What a state of a rollout takes, in host memory and on disk, before there is one."""

from __future__ import annotations

from ..absorption.absorbed_phases import sets_of
from ..absorption.moments import Moments
from ..absorption.settings import blocks_of
from ..cache.byte_plan import HOST, CachePlan, LayerSpec
from ..spec import RolloutSpec
from .renewed_pictures import picture_bytes

# not part of a snapshot: what is staged for the chunk under way
_STAGED = ("current", f"{HOST}current")
# of a file: the names of a layer's tensors with their places, its books, and checksums
_HEADER_LAYER, _HEADER = 2_000, 8_000


def most_state_bytes(spec: RolloutSpec, plan: CachePlan, kept_latents: int = 0) -> int:
    """The most bytes of tensors that a state holds, of a rollout that is planned as `plan` (with its decoder's cache, if it is
    streamed). `kept_latents`: latent frames that it keeps."""
    phases = plan.phases or (plan.first_phase,)
    layers = max(sum(_layer_bytes(plan, room) for room in plan.rooms(phase)) for phase in phases)
    layers = 0 if spec.remade else layers * plan.windows  # no key outlives a chunk that is made anew
    chunk, anchor = spec.chunk_frames * spec.blocks, spec.anchor
    latents = spec.recent_frames + chunk + anchor.state_frames + kept_latents
    latents += chunk if spec.blocks > 1 else 0
    latents += (1 if spec.first_kept else 0) + (1 if spec.reference is not None else 0)
    return (
        layers
        + latents * plan.latent_frame_bytes
        + plan.vae_bytes
        + _absorption_bytes(spec, plan)
        + picture_bytes(spec)
    )


def most_file_bytes(spec: RolloutSpec, plan: CachePlan, kept_latents: int = 0) -> int:
    """The most bytes of the file that such a state is written to."""
    return most_state_bytes(spec, plan, kept_latents) + _HEADER + _HEADER_LAYER * len(plan.layers) * plan.windows


def _layer_bytes(plan: CachePlan, room: LayerSpec) -> int:
    return sum(size for name, size in room.bytes(plan).items() if name not in _STAGED)


def _absorption_bytes(spec: RolloutSpec, plan: CachePlan) -> int:
    """During the warm-up the statistics of all layers but those of the chunk under way; later the corrections in float32, and of
    the watched layers statistics and histories. Each item of a batch has its own."""
    if spec.absorption is None or not plan.phases:
        return 0
    settings, count, width = spec.absorption, len(plan.layers), plan.width
    statistics = (
        (sets_of(settings) - 1) * plan.batch * Moments.nbytes_of(width, blocks := blocks_of(settings, plan.heads))
    )
    switched = settings.layers(count)
    correction = 4 * plan.batch * (width + width * width // blocks)
    watched = switched if settings.monitor_layers < 0 else min(settings.monitor_layers, switched)
    history = 2 * max(one.window_frames for one in plan.rooms(plan.phases[-1])) * plan.frame_bytes
    return max(count * statistics, switched * correction + watched * (statistics + history))
