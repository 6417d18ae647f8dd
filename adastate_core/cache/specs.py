"""Which storage a layer gets: what an anchor policy, a window and the place of the cache ask for together."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..anchors import Anchor
from .byte_plan import LayerSpec
from .deep import DeepSpec
from .rotated import RotatedSpec
from .stored import StoredSpec

# fields of a deep sink, which states of before describe with every layer as these
FIELDS_OF_BEFORE = {"spare_frames": 0, "staged_frames": 0, "query_frames": 0, "shift_selected": False}


def layer_spec(
    anchor: Anchor, window_frames: int, chunk_frames: int, positions: str, shares_window: bool = False
) -> LayerSpec:
    """What an anchor policy and a window need under a position mode, with keys and values as they are on the device."""
    selection = anchor.selection(chunk_frames)
    if selection is None:
        return RotatedSpec.of(anchor, window_frames, chunk_frames, positions, shares_window)
    return DeepSpec(anchor.frames, window_frames, selection=selection, spare_frames=chunk_frames)


def stored(layer: LayerSpec) -> StoredSpec:
    """The same layer with its frames in a store of their own."""
    names = ("blend_frames", "pinned_frames", "replay_frames")
    return StoredSpec(layer.anchor_frames, layer.window_frames, **{name: getattr(layer, name) for name in names})


def layer_from(**described: Any) -> RotatedSpec:
    """A layer as `describe_layer` described it. TypeError for fields that it has not."""
    others = {name: described.pop(name) for name in FIELDS_OF_BEFORE if name in described}
    if others and others != {name: FIELDS_OF_BEFORE[name] for name in others}:
        raise TypeError("a deep sink's layers are its anchor's, and never given")
    return RotatedSpec(**described)


def describe_layer(layer: LayerSpec) -> dict[str, Any]:
    """JSON-able; equal descriptions mean equal layers."""
    described = asdict(layer)
    if not described.get("raw_anchor", True):  # states of before do not name it
        del described["raw_anchor"]
    return described


def described_alike(one: dict[str, Any]) -> dict[str, Any]:
    """A description of any version of the pack as this one's. TypeError for one that is none."""
    return describe_layer(layer_from(**one))
