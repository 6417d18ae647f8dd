"""How many operations (counted_ops.py) each part of a rollout may take at the exact shapes of the 1.3B, 832x480, bf16, and a decode
of its latents.

These numbers only go down: where one falls, put the new one here; none may rise. Counted with torch 2.15 and the host that set-up
brings. Older torches have no fused RMS norm, and take more.
"""

from __future__ import annotations

# a chunk of 3 latent frames in 4 steps with an adaptive state and a window of 3, every block the plain way
PLAIN = {
    "block": 35,
    "its rotation": 8,
    "clean block": 36,
    "outside the blocks, a step": 11,
    "step": 1062,
    "clean pass": 1098,
    "rotation, a chunk": 240,
    "commit, a chunk": 242,
    "beside all these, a chunk": 24,
    "chunk": 5852,
    # among these: 3 copies between the device and the CPU, and 2 numbers that the CPU asks for, all outside the passes
    "crossings, a chunk": 5,
    # read and written, to the next whole one
    "megabytes of a block": 2062,
}
# the same with the functions of its blocks compiled
COMPILED = PLAIN | {
    "block": 16,
    "its rotation": 0,
    "clean block": 17,
    "step": 492,
    "clean pass": 528,
    "chunk": 3002,
    "megabytes of a block": 1142,
}
# the same on hosts whose feed-forward is a class of their own, which keeps a GELU apart
COMPILED_GELU_APART = COMPILED | {
    "block": 17,
    "clean block": 18,
    "step": 522,
    "clean pass": 558,
    "chunk": 3152,
    "megabytes of a block": 1365,
}

# 3 latents in the middle of a video, by way and latents a call
DECODE = {"plain, 1 a call": 1147, "fast, 1 a call": 446, "fast, 3 a call": 156}
# the same on hosts that run the end of the decoder twice for each latent, on two frames at a time
DECODE_IN_HALVES = {"plain, 1 a call": 1459, "fast, 1 a call": 545, "fast, 3 a call": 425}
