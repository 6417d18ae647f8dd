"""The frozen plan of a rollout's caches: every byte is known before anything is allocated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..rope import space_bytes, table_bytes
from .phases import HANDED_ON, Phase, least, resizes
from .working_bytes import block_of, latent_bytes, locked, working_bytes

CACHE_DTYPES = ("model", "fp8", "int8")
CACHE_DEVICES = ("gpu", "host memory")
# names of bytes that are not on the device start with this
HOST = "host_"
# keys and values of anchor, window and current on the device, in every copy
KV_NAMES = ("k", "v", "rotated_copy", "current", "ema", "replay", "scales", "scratch", "prefetch", "selection")
# keys and values of a reference's tokens
REFERENCE = "reference"
# the name of what is held of the cache while the window shrinks at the end of a video, and the names of what that is
HELD = "host_before_the_end"
_KEPT = ("k", "v", "rotated_copy", "ema", "replay", "scales")


@dataclass(frozen=True)
class StoreSize:
    """What a stored layer holds: `frames` as they are or in 8 bits, `blend_frames` in float32."""

    frames: int
    blend_frames: int


@dataclass(frozen=True)
class LayerSpec(ABC):
    """The buffers of one layer, in latent frames. The layers of one plan may differ. Each kind of storage has a subclass, which
    counts its bytes and builds its layer.

    `blend_frames`: anchor frames kept raw in float32. `pinned_frames`: frames of the ring that never leave, in addition to
    `window_frames`; they were in the window and are now a sink. `replay_frames`: first frames kept raw beside the cache.
    """

    anchor_frames: int
    window_frames: int
    blend_frames: int = field(default=0, kw_only=True)
    pinned_frames: int = field(default=0, kw_only=True)
    replay_frames: int = field(default=0, kw_only=True)

    @property
    def ring_frames(self) -> int:
        return self.pinned_frames + self.window_frames

    @property
    def store_size(self) -> StoreSize:
        """What is held apart from the scratch. Of an anchor that blends, only the float32 frames are held."""
        return StoreSize(self.anchor_frames - self.blend_frames + self.ring_frames, self.blend_frames)

    @abstractmethod
    def bytes(self, plan: CachePlan) -> dict[str, int]:
        """Bytes of one such layer by the names of `CachePlan.bytes`."""

    @abstractmethod
    def build(self, plan: CachePlan, device: torch.device, workspace: Any, room: Any) -> Any:
        """The layer's empty buffers (a LayerSlots), as large as the spec `room` says. `workspace` is shared by all layers that are
        stored apart."""

    def locked_bytes(self, plan: CachePlan) -> int:
        """Page-locked memory of one such layer on CUDA, as `locked` rounds it."""
        return 0

    def small(self, window_frames: int, pinned_frames: int) -> LayerSpec:
        """The same layer with another window, and with `pinned_frames` that never leave."""
        return replace(self, window_frames=window_frames, pinned_frames=pinned_frames)

    def kept_of(self, held: int) -> list[int]:
        """Which of `held` frames of a ring, oldest first, it keeps: the oldest `pinned_frames` and the newest frames."""
        pinned = min(self.pinned_frames, held)
        return [*range(pinned), *range(max(pinned, held - self.window_frames), held)]

    def cut(self, frames: int | None) -> LayerSpec:
        """The same layer with a window of at most `frames` (None: as it is)."""
        return self if frames is None or frames >= self.window_frames else replace(self, window_frames=frames)

    def replay_bytes(self, plan: CachePlan) -> int:
        return 2 * self.replay_frames * plan.frame_bytes


@dataclass(frozen=True)
class CachePlan:
    """Every byte of a rollout's caches before anything is allocated.

    `tokens`: P, tokens of a latent frame. `width`: heads * head_dim. `current_frames`: S + F. `text_tokens`: tokens of the prompt.
    `vae_bytes`: the cache of a streaming decoder. `cache_dtype` (one of CACHE_DTYPES) and `cache_device` (one of CACHE_DEVICES) say
    how anchor and window are held. `heads` is needed for the scales. `holds_state`: at the end of the video the cache is held in
    host memory as it was before its window shrank, to go on from. `one_pass_frames`: so many at most are made again by one pass
    (cache/one_pass.py; 0: a chunk at a time). `windows`: so many caches of such layers there are (history.py), which share the
    scratch. `reference_tokens`: of a reference, beside all frames, in every layer.

    `layers` are whole windows. What is allocated are the rooms of a phase: each window cut to the `frames` of the video that are
    ever made (None: not known) and to those that are made while the phase lasts. `phases` come one after the other; none means that
    there is one, of `layers`. `latent_frame_bytes`: of a latent frame in float32. `steps`: noises that its steps take.
    """

    batch: int
    tokens: int
    width: int
    state_frames: int
    chunk_frames: int
    dtype: torch.dtype
    layers: tuple[LayerSpec, ...]
    text_tokens: int = 0
    vae_bytes: int = 0
    heads: int = 1
    cache_dtype: str = "model"
    cache_device: str = "gpu"
    frames: int | None = None
    phases: tuple[Phase, ...] = ()
    latent_frame_bytes: int = 0
    steps: int = 0
    holds_state: bool = False
    one_pass_frames: int = 0
    windows: int = 1
    reference_tokens: int = 0

    @property
    def first_phase(self) -> Phase:
        """The phase with which the rollout begins."""
        return self.phases[0] if self.phases else Phase("whole windows", self.layers)

    def rooms(self, phase: Phase) -> tuple[LayerSpec, ...]:
        """The layers' specs as their buffers are allocated in a phase."""
        frames = least(self.frames, phase.most_frames)
        return tuple(layer.cut(frames) for layer in phase.layers)

    def held(self, phase: Phase) -> CachePlan:
        """A plan of nothing but what is allocated in one phase."""
        only = Phase(phase.name, self.rooms(phase), absorption_bytes=phase.absorption_bytes)
        return replace(self, layers=only.layers, frames=None, phases=(only,))

    @property
    def plain(self) -> CachePlan:
        """The same rollout with whole windows from its first chunk to its last: without absorption."""
        return replace(self, phases=())

    @property
    def expands(self) -> bool:
        """Whether layers are stored apart and expanded into a shared scratch (workspace.py)."""
        return self.cache_dtype != "model" or self.cache_device != "gpu"

    @property
    def most_slots(self) -> int:
        """Slots of the scratch: those of the largest layer."""
        return self.current_frames + max((p.anchor_frames + p.ring_frames for p in self.layers), default=0)

    @property
    def largest_store(self) -> StoreSize:
        """The store that is large enough for the frames of any layer."""
        sizes = [layer.store_size for layer in self.layers]
        return StoreSize(
            max((s.frames for s in sizes), default=0),
            max((s.blend_frames for s in sizes), default=0),
        )

    @property
    def current_frames(self) -> int:
        return self.state_frames + self.chunk_frames

    @property
    def pass_frames(self) -> int:
        """The most frames that a pass has."""
        return max(self.current_frames, self.one_pass_frames)

    @property
    def block_frames(self) -> int:
        """Cached frames that are rotated, or expanded, at a time: a pass's own, so that the work in float32 takes no more
        than theirs does, and never fewer than 3, which keeps the launches few where a chunk is a single frame."""
        return max(self.chunk_frames, 3)

    @property
    def table_frames(self) -> int:
        """How many frames' rotation tables are kept (rope.py): those of one chunk. They turn the anchor and the window of the
        largest layer in any phase, in blocks, and the current frames of the noisy passes and of the clean one."""
        rooms = (room for phase in self.phases or (self.first_phase,) for room in self.rooms(phase))
        return 2 * self.current_frames + max((p.anchor_frames + p.ring_frames for p in rooms), default=0)

    def rope_bytes(self, real_pairs: bool = True) -> int:
        """The most bytes that rotation tables take; half of that without `real_pairs`, on the CPU."""
        head_dim = self.width // self.heads
        tables = table_bytes(head_dim, self.table_frames * self.tokens, real_pairs)
        return tables + space_bytes(head_dim, self.tokens, real_pairs)

    @property
    def frame_bytes(self) -> int:
        """One layer's keys (or values) of one latent frame."""
        return self.batch * self.tokens * self.width * self.dtype.itemsize

    @property
    def reference_bytes(self) -> int:
        """Keys and values of a reference's tokens in all layers."""
        return 2 * len(self.layers) * self.batch * self.reference_tokens * self.width * self.dtype.itemsize

    def bytes(self) -> dict[str, int]:
        """Bytes by name: k, v (anchor and window), rotated copy, current, ema, replay, text_kv, absorption, vae_cache, and of
        a deep sink the selection.

        `rope_tables` are the rotation tables that are kept, and `working` what the largest of the pack's own operations takes
        beside all that (cache/working_bytes.py).

        Layers that are stored apart have `scales` of their 8 bits, the shared `scratch` and, in host memory, the two
        buffers of the `prefetch`; what lies in host memory has names that start with HOST. HELD is there where `holds_state`.

        They are those of the moment at which keys and values take most. `absorption` is what an absorption's statistics and
        corrections add to the most that is taken at any moment.
        """
        moments = list(self.moments())
        largest, host = max(moments, key=_kv), max(moments, key=_on_host)
        sizes = {name: (host if name.startswith(HOST) else largest)[name] for name in largest}
        sizes["absorption"] += max(map(_on_device, moments)) - _on_device(largest)
        if self.holds_state:
            sizes[HELD] = sum(size for name, size in sizes.items() if name.removeprefix(HOST) in _KEPT)
        return sizes

    def moments(self) -> Iterator[dict[str, int]]:
        """Bytes by name at every moment of the rollout at which they change: of each phase, and on the way to the next one."""
        phases = self.phases or (self.first_phase,)
        for i, phase in enumerate(phases):
            if i:
                yield from self.passing(phases[i - 1], phase)
            held = self.held(phase)
            collects = phase.absorption_bytes > 0
            work = {"rope_tables": self.rope_bytes(), "working": working_bytes(held, collects, collects)}
            yield self._sum(held.layers, phase) | (held._shared() if self.expands else {}) | work

    def passing(self, before: Phase, after: Phase) -> Iterator[dict[str, int]]:
        """Bytes by name while a phase passes into the next, each time that a layer's old and new buffers are both there. What
        layers share is given up before and made again afterwards."""
        rooms, new = list(self.rooms(before)), self.rooms(after)
        nothing = dict.fromkeys(self._shared(), 0) if self.expands else {}
        order = resizes(zip(before.layers, rooms, strict=True), list(zip(after.layers, new, strict=True)))
        for i in order:
            both = Counter(self._sum(rooms, after))
            both.update({name: size for name, size in new[i].bytes(self).items() if name not in HANDED_ON})
            yield dict(both) | nothing | {"rope_tables": self.rope_bytes(), "working": latent_bytes(self)}
            rooms[i] = new[i]

    def _sum(self, rooms: Iterable[LayerSpec], phase: Phase) -> dict[str, int]:
        """Bytes by name of layers, and of all that is there beside them but for what layers share."""
        sizes: dict[str, int] = {}
        for room, count in Counter(rooms).items():
            for name, size in room.bytes(self).items():
                sizes[name] = sizes.get(name, 0) + self.windows * count * size
        text = self.batch * self.text_tokens * self.width * self.dtype.itemsize
        others = {
            "text_kv": 2 * len(self.layers) * text,
            "absorption": phase.absorption_bytes,
            "vae_cache": self.vae_bytes,
        }
        others |= {REFERENCE: self.reference_bytes} if self.reference_tokens else {}
        return sizes | others

    def _shared(self) -> dict[str, int]:
        """What layers that are stored apart have in common (cache/workspace.py)."""
        most, host = self.largest_store, self.cache_device != "gpu"
        landing = most.frames * (2 * self.code_bytes + self.scale_bytes) + self.blended_bytes(most.blend_frames)
        return {"scratch": 2 * self.most_slots * self.frame_bytes, "prefetch": 2 * landing if host else 0}

    def snapshot_bytes(self, layer: LayerSpec) -> int:
        """What a layer's snapshot copies from the device at most: all but what is staged for the current chunk."""
        return sum(size for name, size in layer.bytes(self).items() if name != "current" and not name.startswith(HOST))

    @property
    def code_bytes(self) -> int:
        """One layer's stored keys (or values) of one latent frame."""
        return self.frame_bytes if self.cache_dtype == "model" else self.batch * self.tokens * self.width

    @property
    def scale_bytes(self) -> int:
        """One layer's scales of one latent frame, of keys and values."""
        return 0 if self.cache_dtype == "model" else 2 * self.batch * self.heads * 4

    def blended_bytes(self, frames: int) -> int:
        """Keys and values of `frames` in float32."""
        return 2 * frames * self.batch * self.tokens * self.width * 4

    @property
    def kv_bytes(self) -> int:
        """All keys and values of anchor, window and current on the device, in every copy."""
        return _kv(self.bytes())

    @property
    def host_bytes(self) -> int:
        """The same in host memory; what is held while the window shrinks is no part of a cache."""
        return _on_host(self.bytes()) - self.held_bytes

    @property
    def held_bytes(self) -> int:
        """What is held in host memory while the window shrinks, at most."""
        return self.bytes().get(HELD, 0)

    @property
    def locked_bytes(self) -> int:
        """Page-locked memory on CUDA as torch really takes it: of layers in host memory, of a snapshot's two staging buffers and
        of a chunk's noise. While a phase passes into the next, a layer is there twice."""
        layers = 0
        for phase in self.phases or (self.first_phase,):
            sizes = [room.locked_bytes(self) for room in self.rooms(phase)]
            passing = max(sizes, default=0) if len(self.phases) > 1 else 0
            layers = max(layers, self.windows * sum(sizes) + passing)
        staged = block_of(max((self.snapshot_bytes(layer) for layer in self.layers), default=0))
        return layers + 2 * staged + locked(self.steps * self.current_frames * self.latent_frame_bytes)

    @property
    def total_bytes(self) -> int:
        """All bytes on the device."""
        return _on_device(self.bytes())

    @property
    def absorption_bytes(self) -> int:
        """The most that an absorption's statistics and corrections take in any phase."""
        return max((phase.absorption_bytes for phase in self.phases), default=0)

    def with_batch(self, batch: int) -> CachePlan:
        """The same plan of a smaller batch: everything that is of single items takes its share."""
        shared = {name: getattr(self, name) * batch // self.batch for name in ("vae_bytes", "latent_frame_bytes")}
        phases = tuple(replace(p, absorption_bytes=p.absorption_bytes * batch // self.batch) for p in self.phases)
        return replace(self, batch=batch, phases=phases, **shared)

    def with_window(self, window_frames: int) -> CachePlan:
        """The same plan with every window cut to at most `window_frames`."""
        phases = tuple(replace(p, layers=tuple(layer.cut(window_frames) for layer in p.layers)) for p in self.phases)
        return replace(self, layers=tuple(layer.cut(window_frames) for layer in self.layers), phases=phases)


def _kv(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name in KV_NAMES)


def _on_host(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if name.startswith(HOST))


def _on_device(sizes: dict[str, int]) -> int:
    return sum(size for name, size in sizes.items() if not name.startswith(HOST))
