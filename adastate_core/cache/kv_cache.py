"""The KV cache of a rollout: the buffers of one run, layer by layer, as a plan (cache/byte_plan.py) lays them out.

What a layer's buffers look like is its storage's: cache/rotated.py, cache/stored.py, cache/deep.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ..anchors import Anchor
from ..rope import Layout, Rope
from ..shots import NOTHING
from .byte_plan import HOST, CachePlan
from .cut_snapshot import cut_to
from .eight_bits import check_cache_dtype
from .host_copies import HostCopies, block_bytes
from .phases import HANDED_ON, Phase, resizes
from .slots import LayerSlots, LayerSnapshot
from .steps import Step, Steps
from .workspace import Workspace


class KVCache:
    """All layers' buffers of one run, and the text keys and values of the current prompt."""

    def __init__(
        self, plan: CachePlan, heads: int, device: torch.device | str = "cpu", workspace: Workspace | None = None
    ) -> None:
        """`workspace`: that of another cache of the same plan, which passes use in turn. ValueError if the device has no casts for
        the plan's `cache_dtype`."""
        self.plan, self.heads, self.device = plan, heads, torch.device(device)
        check_cache_dtype(plan.cache_dtype, self.device)
        # what every layer is to be; where a resize failed, layers are not there yet
        self.phase = plan.first_phase
        self.shares = workspace is not None
        if workspace is None and plan.expands:
            workspace = Workspace(plan.held(self.phase), self.device)
        self.workspace = workspace
        self.layers: list[LayerSlots] = [
            layer.build(plan, self.device, self.workspace, room)
            for layer, room in zip(self.phase.layers, plan.rooms(self.phase), strict=True)
        ]
        # the most bytes that were ever allocated on the device, and in host memory
        self.peak_nbytes, self.peak_host_nbytes = self.nbytes, self.host_nbytes
        self._text: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._text_key: object = None

    def __iter__(self) -> Iterator[LayerSlots]:
        return iter(self.layers)

    def bytes(self) -> dict[str, int]:
        """Bytes really allocated for keys and values, by the names of `plan.bytes()`."""
        sizes: dict[str, int] = {} if self.workspace is None or self.shares else self.workspace.bytes()
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

    def close(self) -> None:
        """Let go of all buffers; the most bytes that there were stay known."""
        self.layers, self.workspace = [], None
        self._text.clear()

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
        self, anchor: Anchor, first_frame: int, content_frames: int, pin: range = NOTHING
    ) -> tuple[list[Step], list[Callable[[], None]]]:
        """(steps that cache what a kept pass staged, what to call after them). Nothing is changed yet, and it may fail. The frames
        of `pin` stay (shots.py) in layers that have not lost their history."""
        made = (layer.scratch(anchor.blends) for layer in self.layers)
        scratch = next((one for one in made if one is not None), None)
        steps, left = [], []
        for index, layer in enumerate(self.layers):
            draft = layer.draft(scratch)
            keeps = self.phase.layers[index] == self.plan.layers[index]
            draft.fill(anchor, first_frame, content_frames, self.plan.state_frames, pin, keeps)
            steps += [Step(index, write) for write in draft.writes]
            left += draft.left
        return steps, left

    def commit(self, anchor: Anchor, first_frame: int, content_frames: int) -> None:
        """Cache what a kept pass staged, at once."""
        steps, left = self.prepared(anchor, first_frame, content_frames)
        Steps(steps).run()
        for told in left:
            told()

    def enter(self, phase: Phase) -> None:
        """From now on `phase` says what every layer is to be. `fit` brings the layers there; states say it at once."""
        self.phase = phase

    def reach(self, frames: int) -> None:
        """As many frames of the video may be made; `fit` makes room for them."""
        if self.plan.frames is not None and frames > self.plan.frames:
            self.plan = replace(self.plan, frames=frames)

    def fit(self) -> None:
        """Bring every layer to what it is to be, one at a time, in the order of `resizes`.

        If that fails, each layer is what it was or what it is to be, with the same frames, and `fit` may be called again. It has to
        have succeeded before the next pass.
        """
        rooms = self.plan.rooms(self.phase)
        sizes = list(zip(self.phase.layers, rooms, strict=True))
        order = resizes([(layer.layer, layer.room) for layer in self.layers], sizes)
        if not order:
            return
        if self.workspace is not None:
            self.workspace.give_up()
        for i in order:
            new = self.layers[i].resized(*sizes[i])
            self._note(new.bytes())
            self.layers[i] = new
        if self.workspace is not None:
            self.workspace.fit(self.plan.held(self.phase))
        self._note({})

    def _note(self, more: dict[str, int]) -> None:
        """Remember what is allocated while the buffers `more` are there, too."""
        sizes = list(self.bytes().items()) + [(name, size) for name, size in more.items() if name not in HANDED_ON]
        host = sum(size for name, size in sizes if name.startswith(HOST))
        self.peak_nbytes = max(self.peak_nbytes, sum(size for _, size in sizes) - host)
        self.peak_host_nbytes = max(self.peak_host_nbytes, host)

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
        """Copies of all layers on the CPU as the phase says; what happens to the cache afterwards does not change them. A layer
        that has not shrunk yet is cut there."""
        held = replace(self.plan, layers=tuple(layer.room for layer in self.layers))
        copies = HostCopies(self.device, block_bytes(held))
        saved = [layer.snapshot(copies) for layer in self.layers]
        copies.wait()
        return tuple(
            one if layer.layer == spec else cut_to(one, spec)
            for one, layer, spec in zip(saved, self.layers, self.phase.layers, strict=True)
        )

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
