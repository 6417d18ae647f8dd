"""Texts through the host's text encoder, as CLIP Text Encode does it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .progress import Progress


def encode_texts(clip: Any, texts: Iterable[str]) -> dict[str, Any]:
    """The CONDITIONING of each distinct text, encoded once; an interrupt comes through between two of them."""
    if clip is None:
        raise ValueError("clip is empty: the checkpoint holds no text encoder; load umt5-xxl with Load CLIP, type wan")
    distinct = list(dict.fromkeys(texts))
    progress, encoded = Progress(len(distinct)), {}
    for text in distinct:
        encoded[text] = encode_one(clip, text)
        progress.step()
    return encoded


def encode_one(clip: Any, text: str) -> Any:
    """The CONDITIONING of a text."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def on_the_cpu(clip: Any) -> bool:
    """Whether a text encoder works on the CPU, where the host loads it without moving any other model."""
    device = getattr(getattr(clip, "patcher", None), "load_device", None)
    return getattr(device, "type", None) == "cpu"
