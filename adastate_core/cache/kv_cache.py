"""The KV cache of a rollout: the buffers of one run, layer by layer, as a plan (cache/byte_plan.py) lays them out.

What a layer's buffers look like is its storage's: cache/rotated.py, cache/stored.py, cache/deep.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..anchors import Anchor
from ..rope import Layout, Rope
from .byte_plan import HOST, CachePlan
from .eight_bits import check_cache_dtype
from .slots import LayerSlots, LayerSnapshot
from .steps import Step, Steps
from .workspace import Workspace


class KVCache:
    """All layers' buffers of one run, and the text keys and values of the current prompt."""

    def __init__(self, plan: CachePlan, heads: int, device: torch.device | str = "cpu") -> None:
        """ValueError if the device has no casts for the plan's `cache_dtype`."""
        self.plan, self.heads, self.device = plan, heads, torch.device(device)
        check_cache_dtype(plan.cache_dtype, self.device)
        self.workspace = Workspace(plan, self.device) if plan.expands else None
        self.layers: list[LayerSlots] = [layer.build(plan, self.device, self.workspace) for layer in plan.layers]
        self._text: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._text_key: object = None

    def __iter__(self) -> Iterator[LayerSlots]:
        return iter(self.layers)

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated for keys and values, by the names of `plan.bytes()`."""
        sizes: dict[str, int] = {} if self.workspace is None else self.workspace.bytes()
        for layer in self.layers:
            for name, size in layer.bytes().items():
                sizes[name] = sizes.get(name, 0) + size
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes really allocated on the device for keys and values (compare with `plan.kv_bytes`)."""
        return sum(size for name, size in self.bytes().items() if not name.startswith(HOST))

    @property
    def host_nbytes(self) -> int:
        """The same in host memory (compare with `plan.host_bytes`)."""
        return sum(size for name, size in self.bytes().items() if name.startswith(HOST))

    def start_chunk(self) -> None:
        """Before the passes of a chunk; what an interrupted one chose is forgotten."""
        for layer in self.layers:
            if layer.selects:
                layer.start_chunk()

    def begin(self) -> None:
        """A pass over all layers starts."""
        if self.workspace is not None:
            self.workspace.begin(self.layers)

    def open(self, layer: int) -> None:
        """It is this layer's turn in the pass: its `read` gives its keys and values until the next one's turn."""
        if self.workspace is not None:
            self.workspace.open(self.layers, layer)

    def turns(self, layout: Layout, rope: Rope) -> Iterator[Step]:
        """Steps that bring every cached key to its position in `layout`, each to be run before the next is made."""
        for index, layer in enumerate(self.layers):
            for write in layer.turns(layout, rope, self.heads):
                yield Step(index, write)

    def prepared(
        self, anchor: Anchor, first_frame: int, content_frames: int
    ) -> tuple[list[Step], list[Callable[[], None]]]:
        """(steps that cache what a kept pass staged, what to call after them). Nothing is changed yet, and it may fail."""
        scratch = next((made for layer in self.layers if (made := layer.scratch()) is not None), None)
        steps, left = [], []
        for index, layer in enumerate(self.layers):
            draft = layer.draft(scratch)
            draft.fill(anchor, first_frame, content_frames, self.plan.state_frames)
            steps += [Step(index, write) for write in draft.writes]
            left += draft.left
        return steps, left

    def commit(self, anchor: Anchor, first_frame: int, content_frames: int) -> None:
        """Cache what a kept pass staged, at once."""
        steps, left = self.prepared(anchor, first_frame, content_frames)
        Steps(steps).run()
        for told in left:
            told()

    def fit(self) -> None:
        """After `plan` and layers were changed: what they share takes the size that the plan says."""
        if self.workspace is not None:
            self.workspace.fit(self.plan)

    @property
    def text_nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._text.values())

    @property
    def anchor_present(self) -> int:
        return max((len(layer.anchor) for layer in self.layers), default=0)

    @property
    def window_present(self) -> int:
        return max((layer.held for layer in self.layers), default=0)

    def text(
        self, layer: int, key: object, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's text keys and values, made once for each `key` (the prompt and the weights' identity)."""
        if key != self._text_key:
            self._text.clear()
            self._text_key = key
        if layer not in self._text:
            self._text[layer] = make()
        return self._text[layer]

    def snapshot(self) -> tuple[LayerSnapshot, ...]:
        return tuple(layer.snapshot() for layer in self.layers)

    def restore(self, saved: tuple[LayerSnapshot, ...]) -> None:
        """Take over what `snapshot` gave. ValueError if it does not fit."""
        Steps(self.restores(saved)).run()

    def restores(self, saved: tuple[LayerSnapshot, ...]) -> list[Step]:
        """The steps of `restore`."""
        if len(saved) != len(self.layers):
            raise ValueError(f"the state holds {len(saved)} layers, the model has {len(self.layers)}")
        return [
            Step(i, partial(layer.restore, one)) for i, (layer, one) in enumerate(zip(self.layers, saved, strict=True))
        ]
