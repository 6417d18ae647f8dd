"""The frozen plan of a rollout's caches: every byte is known before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .anchors import Anchor


@dataclass(frozen=True)
class LayerPlan:
    """One layer's buffers, in latent frames. Layers of one plan may differ.

    `keep_raw`: an un-rotated copy of the window's keys; `blend_frames`: anchor frames kept raw in float32;
    `pinned_frames`: window frames beside `window_frames` that never leave (a sink that was window once);
    `replay_frames`: first frames kept raw beside the cache.
    """

    anchor_frames: int
    window_frames: int
    keep_raw: bool = False
    blend_frames: int = 0
    pinned_frames: int = 0
    replay_frames: int = 0

    @property
    def ring_frames(self) -> int:
        return self.pinned_frames + self.window_frames

    @staticmethod
    def of(anchor: Anchor, window_frames: int, chunk_frames: int, positions: str) -> LayerPlan:
        """The plan that an anchor policy and a window need under a position mode."""
        moves = positions != "absolute"
        keep_raw = moves and window_frames > 0 and (window_frames > chunk_frames or anchor.blends)
        blended = anchor.frames if anchor.blends else 0
        return LayerPlan(anchor.frames, window_frames, keep_raw, blended, replay_frames=anchor.replay_frames)


@dataclass(frozen=True)
class CachePlan:
    """Every byte of a rollout's caches before anything is allocated.

    `tokens` P is tokens a latent frame, `width` heads * head_dim, `current_frames` S + F, `text_tokens` of the
    prompt, `vae_bytes` of a streaming decoder's own cache, `absorption_bytes` of an absorption's statistics.
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

    @property
    def current_frames(self) -> int:
        return self.state_frames + self.chunk_frames

    @property
    def frame_bytes(self) -> int:
        """One layer's keys (or values) of one latent frame."""
        return self.batch * self.tokens * self.width * self.dtype.itemsize

    def bytes(self) -> dict[str, int]:
        """Bytes by name: k, v (anchor and window), rotated copy, current, ema, replay, text_kv, absorption, vae_cache."""
        kept = sum(layer.anchor_frames + layer.ring_frames for layer in self.layers)
        copies = sum(layer.ring_frames for layer in self.layers if layer.keep_raw)
        blended = sum(layer.blend_frames for layer in self.layers)
        elements = self.batch * self.tokens * self.width
        text = self.batch * self.text_tokens * self.width * self.dtype.itemsize
        return {
            "k": kept * self.frame_bytes,
            "v": kept * self.frame_bytes,
            "rotated_copy": copies * self.frame_bytes,
            "current": 2 * len(self.layers) * self.current_frames * self.frame_bytes,
            "ema": 2 * blended * elements * 4,
            "replay": 2 * sum(layer.replay_frames for layer in self.layers) * self.frame_bytes,
            "text_kv": 2 * len(self.layers) * text,
            "absorption": self.absorption_bytes,
            "vae_cache": self.vae_bytes,
        }

    @property
    def kv_bytes(self) -> int:
        """All keys and values of anchor, window and current, in every copy."""
        sizes = self.bytes()
        return sum(sizes[name] for name in ("k", "v", "rotated_copy", "current", "ema", "replay"))

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes().values())

    def with_window(self, window_frames: int) -> CachePlan:
        """The same plan with every window cut to at most `window_frames`."""
        layers = tuple(replace(p, window_frames=min(p.window_frames, window_frames)) for p in self.layers)
        return replace(self, layers=layers)
