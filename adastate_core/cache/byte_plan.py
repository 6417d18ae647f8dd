"""The frozen plan of a rollout's caches: every byte is known before anything is allocated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch

CACHE_DTYPES = ("model", "fp8", "int8")
CACHE_DEVICES = ("gpu", "host memory")
# names of bytes that are not on the device start with this
HOST = "host_"


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
    def build(self, plan: CachePlan, device: torch.device, workspace: Any) -> Any:
        """The layer's empty buffers (a LayerSlots). `workspace` is shared by all layers that are stored apart."""

    def small(self, window_frames: int, pinned_frames: int) -> LayerSpec:
        """The same layer with another window, and with `pinned_frames` that never leave."""
        return replace(self, window_frames=window_frames, pinned_frames=pinned_frames)

    def replay_bytes(self, plan: CachePlan) -> int:
        return 2 * self.replay_frames * plan.frame_bytes


@dataclass(frozen=True)
class CachePlan:
    """Every byte of a rollout's caches before anything is allocated.

    `tokens`: P, tokens of a latent frame. `width`: heads * head_dim. `current_frames`: S + F. `text_tokens`: tokens of the prompt.
    `vae_bytes`: the cache of a streaming decoder. `absorption_bytes`: an absorption's statistics. `cache_dtype` (one of
    CACHE_DTYPES) and `cache_device` (one of CACHE_DEVICES) say how anchor and window are held. `heads` is needed for the scales.
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
    absorption_bytes: int = 0
    heads: int = 1
    cache_dtype: str = "model"
    cache_device: str = "gpu"

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
    def frame_bytes(self) -> int:
        """One layer's keys (or values) of one latent frame."""
        return self.batch * self.tokens * self.width * self.dtype.itemsize

    def bytes(self) -> dict[str, int]:
        """Bytes by name: k, v (anchor and window), rotated copy, current, ema, replay, text_kv, absorption, vae_cache, and of
        a deep sink the selection.

        Layers that are stored apart have `scales` of their 8 bits, the shared `scratch` and, in host memory, the two
        buffers of the `prefetch`; what lies in host memory has names that start with HOST.
        """
        sizes: dict[str, int] = {}
        for layer in self.layers:
            for name, size in layer.bytes(self).items():
                sizes[name] = sizes.get(name, 0) + size
        text = self.batch * self.text_tokens * self.width * self.dtype.itemsize
        others = {
            "text_kv": 2 * len(self.layers) * text,
            "absorption": self.absorption_bytes,
            "vae_cache": self.vae_bytes,
        }
        return sizes | (self._shared() if self.expands else {}) | others

    def _shared(self) -> dict[str, int]:
        """What layers that are stored apart have in common (cache/workspace.py)."""
        most, host = self.largest_store, self.cache_device != "gpu"
        landing = most.frames * (2 * self.code_bytes + self.scale_bytes) + self.blended_bytes(most.blend_frames)
        return {"scratch": 2 * self.most_slots * self.frame_bytes, "prefetch": 2 * landing if host else 0}

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
        names = ("k", "v", "rotated_copy", "current", "ema", "replay", "scales", "scratch", "prefetch", "selection")
        return sum(size for name, size in self.bytes().items() if name in names)

    @property
    def host_bytes(self) -> int:
        """The same in host memory."""
        return sum(size for name, size in self.bytes().items() if name.startswith(HOST))

    @property
    def total_bytes(self) -> int:
        """All bytes on the device."""
        return sum(size for name, size in self.bytes().items() if not name.startswith(HOST))

    def with_window(self, window_frames: int) -> CachePlan:
        """The same plan with every window cut to at most `window_frames`."""
        layers = tuple(replace(p, window_frames=min(p.window_frames, window_frames)) for p in self.layers)
        return replace(self, layers=layers)
