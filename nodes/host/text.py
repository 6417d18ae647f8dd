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
        encoded[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        progress.step()
    return encoded
