"""Which way a stream's pictures were made, as states say it: the two differ in the last bits."""

from __future__ import annotations

# plain: the VAE's own modules, VAE Decode's bits. fast: fewer passes over memory; nodes/host/codec.py says how
PLAIN, FAST = WAYS = ("plain", "fast")
# what a decoder's snapshot says it under; one without it is plain
WAY = "vae_way"


def way_of(saved: dict) -> str:
    """The way that made what a decoder's snapshot carries."""
    return saved.get(WAY, PLAIN)
