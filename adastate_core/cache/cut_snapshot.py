"""A layer's snapshot as it will be once the layer was made smaller: so a state does not wait for a layer's new buffers."""

from __future__ import annotations

from dataclasses import replace

from .byte_plan import LayerSpec
from .slots import LayerSnapshot


def cut_to(saved: LayerSnapshot, layer: LayerSpec) -> LayerSnapshot:
    """The snapshot that the same layer would give once it was resized to a smaller `layer`."""
    anchors, held = len(saved.anchor_slots), len(saved.ring_slots)
    kept = layer.kept_of(held)
    order = [*range(anchors), *(anchors + i for i in kept)]
    tensors = dict(saved.tensors)
    for name in ("keys", "values", "scales", "raw"):
        if (tensor := tensors.get(name)) is not None:
            first = tensor.shape[1] - held  # an anchor that blends may be in the blend tensors alone
            tensors[name] = tensor[:, [*range(first), *(first + i for i in kept)]]
    if not layer.ring_frames:  # nothing will have to be rotated again
        tensors.pop("raw", None)
    return replace(
        saved,
        ring_slots=tuple(range(len(kept))),
        frames=tuple(saved.frames[i] for i in order),
        positions=tuple(saved.positions[i] for i in order),
        tensors=tensors,
        pinned=min(layer.pinned_frames, len(kept)),
    )
