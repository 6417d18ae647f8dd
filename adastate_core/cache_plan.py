"""The frozen plan of a rollout's caches: every byte is known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .anchors import Anchor, AnchorDeep

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
class LayerPlan:
    """One layer's buffers, in latent frames. Layers of one plan may differ.

    `keep_raw`: an un-rotated copy of the window's keys; `blend_frames`: anchor frames kept raw in float32;
    `pinned_frames`: window frames beside `window_frames` that never leave (a sink that was window once);
    `replay_frames`: first frames kept raw beside the cache. Of a deep sink (deep_sink.py): `spare_frames` beside the window
    until the next chunk chooses, `staged_frames` that it chooses, `query_frames` whose summed queries are kept, and
    `shift_selected` of its anchor.
    """

    anchor_frames: int
    window_frames: int
    keep_raw: bool = False
    blend_frames: int = 0
    pinned_frames: int = 0
    replay_frames: int = 0
    spare_frames: int = 0
    staged_frames: int = 0
    query_frames: int = 0
    shift_selected: bool = False

    @property
    def ring_frames(self) -> int:
        return self.pinned_frames + self.window_frames

    @property
    def store_size(self) -> StoreSize:
        """What is held apart from the scratch; an anchor that blends has its float32 frames only."""
        return StoreSize(self.anchor_frames - self.blend_frames + self.ring_frames, self.blend_frames)

    @staticmethod
    def of(anchor: Anchor, window_frames: int, chunk_frames: int, positions: str) -> LayerPlan:
        """The plan that an anchor policy and a window need under a position mode."""
        if isinstance(anchor, AnchorDeep):
            staged, queries = anchor.staged_frames(chunk_frames), anchor.past_recent_frames(chunk_frames)
            deep = dict(spare_frames=chunk_frames, staged_frames=staged, query_frames=queries)
            return LayerPlan(anchor.frames, window_frames, keep_raw=True, shift_selected=anchor.shift_selected, **deep)
        moves = positions != "absolute"
        keep_raw = moves and window_frames > 0 and (window_frames > chunk_frames or anchor.blends)
        blended = anchor.frames if anchor.blends else 0
        return LayerPlan(anchor.frames, window_frames, keep_raw, blended, replay_frames=anchor.replay_frames)


@dataclass(frozen=True)
class CachePlan:
    """Every byte of a rollout's caches before anything is allocated.

    `tokens` P is tokens a latent frame, `width` heads * head_dim, `current_frames` S + F, `text_tokens` of the
    prompt, `vae_bytes` of a streaming decoder's own cache, `absorption_bytes` of an absorption's statistics. `cache_dtype`
    (of CACHE_DTYPES) and `cache_device` (of CACHE_DEVICES) say how anchor and window are held; `heads` counts scales.
    """

    batch: int
    tokens: int
    width: int
    state_frames: int
    chunk_frames: int
    dtype: torch.dtype
    layers: tuple[LayerPlan, ...]
    text_tokens: int = 0
    vae_bytes: int = 0
    absorption_bytes: int = 0
    heads: int = 1
    cache_dtype: str = "model"
    cache_device: str = "gpu"

    @property
    def expands(self) -> bool:
        """Whether layers are stored apart and expanded into a shared scratch (kv_storage.py)."""
        return self.cache_dtype != "model" or self.cache_device != "gpu"

    @property
    def most_slots(self) -> int:
        """Slots of the scratch: those of the largest layer."""
        return self.current_frames + max((p.anchor_frames + p.ring_frames for p in self.layers), default=0)

    @property
    def largest_store(self) -> StoreSize:
        """What holds any layer's frames."""
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
        text = self.batch * self.text_tokens * self.width * self.dtype.itemsize
        others = {
            "replay": 2 * sum(layer.replay_frames for layer in self.layers) * self.frame_bytes,
            "text_kv": 2 * len(self.layers) * text,
            "absorption": self.absorption_bytes,
            "vae_cache": self.vae_bytes,
        }
        if any(layer.spare_frames for layer in self.layers):
            others["selection"] = sum(self._selection_bytes(layer) for layer in self.layers)
        return (self._stored() if self.expands else self._rotated()) | others

    def _rotated(self) -> dict[str, int]:
        kept = sum(layer.anchor_frames + layer.ring_frames + layer.spare_frames for layer in self.layers)
        copies = sum(layer.ring_frames + layer.spare_frames for layer in self.layers if layer.keep_raw)
        return {
            "k": kept * self.frame_bytes,
            "v": kept * self.frame_bytes,
            "rotated_copy": copies * self.frame_bytes,
            "current": 2 * len(self.layers) * self.current_frames * self.frame_bytes,
            "ema": self._blended_bytes(sum(layer.blend_frames for layer in self.layers)),
        }

    def _stored(self) -> dict[str, int]:
        host = self.cache_device != "gpu"
        kept = sum(layer.store_size.frames for layer in self.layers)
        held = {
            "k": kept * self._code_bytes,
            "v": kept * self._code_bytes,
            "scales": kept * self._scale_bytes,
            "current": 2 * len(self.layers) * self.current_frames * self.frame_bytes,
            "ema": self._blended_bytes(sum(layer.blend_frames for layer in self.layers)),
        }
        most = self.largest_store
        landing = most.frames * (2 * self._code_bytes + self._scale_bytes) + self._blended_bytes(most.blend_frames)
        shared = {"scratch": 2 * self.most_slots * self.frame_bytes, "prefetch": 2 * landing if host else 0}
        return {f"{HOST}{name}" if host else name: size for name, size in held.items()} | shared

    @property
    def _code_bytes(self) -> int:
        """One layer's stored keys (or values) of one latent frame."""
        return self.frame_bytes if self.cache_dtype == "model" else self.batch * self.tokens * self.width

    @property
    def _scale_bytes(self) -> int:
        """One layer's scales of one latent frame, of keys and values."""
        return 0 if self.cache_dtype == "model" else 2 * self.batch * self.heads * 4

    def _selection_bytes(self, layer: LayerPlan) -> int:
        """A deep sink's staged frames, its chosen tokens' ids (those in the cache, those being chosen) and summed queries."""
        chosen = (layer.staged_frames - layer.query_frames) * self.tokens
        queries = (layer.query_frames + self.chunk_frames) * self.width * 4
        return 2 * layer.staged_frames * self.frame_bytes + self.batch * (2 * 8 * chosen + queries)

    def _blended_bytes(self, frames: int) -> int:
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
