"""What several GPUs would give one long video, by calculation: python -m benchmarks.sequence_parallel

Nothing here is measured, and the pack does not do it: docs/sequence-parallel.md says what it would take. The tokens of a pass are
split over the GPUs, and for the self-attention its heads are (arXiv 2309.14509). The cache is split by heads and stays where it is.
Writes benchmarks/results/sequence-parallel.md; all assumptions are in it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "sequence-parallel.md"
TOKENS = 1560  # of a latent frame at 832x480
TEXT = 512  # tokens of a prompt
PICTURES = 12  # of a chunk of three latent frames
ITEM = 2  # bytes of a number in bf16
GPUS = (1, 2, 4, 8)
TILE = 128  # rows and columns of a product that one multiprocessor makes at a time
# activations [N, width] that the functions of attention/block.py and the norm of the cross attention read and write in a block
MOVED = 2 + 6 + 4 + 4 + 3 + 2
KERNELS = 17  # of a block, with these functions compiled
EXCHANGE_KERNELS = 7  # more: two exchanges, each packed and unpacked, and norm and rotation apart


@dataclass(frozen=True)
class Model:
    """The sizes of a Wan transformer."""

    name: str
    width: int
    feed_forward: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Rollout:
    """`frames` of a pass, state included; `read` frames of keys that each query reads, its own included; `passes` a chunk."""

    name: str
    model: Model
    frames: int
    read: int
    passes: int = 5


@dataclass(frozen=True)
class Card:
    """What is assumed of a GPU: bf16 operations and bytes of memory a second on paper, and the shares of them that are reached;
    multiprocessors; seconds of the CPU a launch, and of an exchange beside its bytes."""

    name: str = "H100 SXM"
    operations: float = 989e12
    memory: float = 3.35e12
    matrix_share: float = 0.65
    memory_share: float = 0.75
    multiprocessors: int = 132
    launch: float = 6e-6
    latency: float = 20e-6


@dataclass(frozen=True)
class Link:
    """Bytes a second that a GPU sends, while it receives as many, on paper; and the share that is reached."""

    name: str
    bytes: float
    share: float = 0.75


SMALL = Model("1.3B", 1536, 8960, 30, 12)
LARGE = Model("14B", 5120, 13824, 40, 40)
ROLLOUTS = (
    Rollout("adastate", SMALL, 4, 8),
    Rollout("self_forcing", SMALL, 3, 21),
    Rollout("adastate", LARGE, 4, 8),
    Rollout("self_forcing", LARGE, 3, 21),
)
LINKS = (Link("NVLink 4", 450e9), Link("PCIe 5", 64e9), Link("PCIe 4", 32e9))
NAMES = [link.name for link in LINKS]
WORK = (
    "preset", "model", "frames a pass", "frames read", "linears TFLOP", "self-attention TFLOP", "text TFLOP", "all TFLOP",
    "moved between them GB", "cache GiB",
)  # fmt: skip
EXCHANGE = (
    "preset", "model", "GPUs", "a layer and pass MB", "a chunk GB", *[f"{name} ms" for name in NAMES], "split by tokens MB",
    "times as much",
)  # fmt: skip
SPEED = (
    "preset", "model", "GPUs", "heads a GPU", "cache GiB a GPU", "computing ms", *[f"exchange ms, {name}" for name in NAMES],
    *[f"times faster, {name}" for name in NAMES],
)  # fmt: skip


def linear_operations(rollout: Rollout) -> int:
    """Of a block's linears in a pass: q, k, v, o, the q and o of the cross attention, and the two of the feed-forward."""
    n, model = rollout.frames * TOKENS, rollout.model
    return 2 * n * model.width * (6 * model.width + 2 * model.feed_forward)


def attention_operations(rollout: Rollout) -> int:
    """Of a block's self-attention in a pass: q.k and the sum over values."""
    return 4 * (rollout.frames * TOKENS) * (rollout.read * TOKENS) * rollout.model.width


def text_operations(rollout: Rollout) -> int:
    """Of a block's cross attention in a pass; the text's keys and values are made once a prompt."""
    return 4 * (rollout.frames * TOKENS) * TEXT * rollout.model.width


def moved_bytes(rollout: Rollout) -> int:
    """What the functions between the linears read and write in a block and pass."""
    return MOVED * rollout.frames * TOKENS * rollout.model.width * ITEM


def most_heads(model: Model, gpus: int) -> int:
    """Heads of the GPU that has the most."""
    return math.ceil(model.heads / gpus)


def cache_bytes(rollout: Rollout, gpus: int) -> int:
    """Keys and values that the GPU with the most heads has, all layers together, without copies."""
    width = most_heads(rollout.model, gpus) * rollout.model.width // rollout.model.heads
    return 2 * rollout.read * TOKENS * width * ITEM * rollout.model.layers


def exchanged_bytes(rollout: Rollout, gpus: int) -> int:
    """What the GPU with the most heads gets and gives in a layer of a pass: q, k and v of the others' tokens, and what it made
    of them, back."""
    width = most_heads(rollout.model, gpus) * rollout.model.width // rollout.model.heads
    tokens = rollout.frames * TOKENS
    return 4 * (tokens - tokens // gpus) * width * ITEM


def exchanged_by_tokens(rollout: Rollout, gpus: int) -> int:
    """The same where each GPU caches the keys and values of its own tokens, so that all that is read is exchanged in every pass."""
    width = most_heads(rollout.model, gpus) * rollout.model.width // rollout.model.heads
    queries, keys = rollout.frames * TOKENS, rollout.read * TOKENS
    return 2 * (queries - queries // gpus + keys - keys // gpus) * width * ITEM


def fill(tiles: int, card: Card) -> float:
    """The share of the multiprocessors that have work, where so many tiles are made in whole waves."""
    return tiles / (math.ceil(tiles / card.multiprocessors) * card.multiprocessors)


def product_seconds(rows: int, inner: int, columns: int, card: Card) -> float:
    """[rows, inner] times [inner, columns]."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns / TILE)
    return 2 * rows * inner * columns / (card.operations * card.matrix_share * fill(tiles, card))


def compute_seconds(rollout: Rollout, gpus: int, card: Card) -> float:
    """A chunk without the exchanges, on the GPU that has the most to do; no less than the CPU takes for its launches."""
    model = rollout.model
    rows = math.ceil(rollout.frames * TOKENS / gpus)
    linears = 6 * product_seconds(rows, model.width, model.width, card)
    linears += product_seconds(rows, model.width, model.feed_forward, card)
    linears += product_seconds(rows, model.feed_forward, model.width, card)
    heads = most_heads(model, gpus)
    tiles = heads * math.ceil(rollout.frames * TOKENS / TILE)
    attended = attention_operations(rollout) * heads / model.heads
    attention = attended / (card.operations * card.matrix_share * fill(tiles, card))
    text_tiles = model.heads * math.ceil(rows / TILE)
    text = text_operations(rollout) / gpus / (card.operations * card.matrix_share * fill(text_tiles, card))
    moving = moved_bytes(rollout) / gpus / (card.memory * card.memory_share)
    launches = (KERNELS + (EXCHANGE_KERNELS if gpus > 1 else 0)) * card.launch
    return rollout.passes * model.layers * max(linears + attention + text + moving, launches)


def exchange_seconds(rollout: Rollout, gpus: int, card: Card, link: Link) -> float:
    """The exchanges of a chunk: two a layer and pass, nothing else going on meanwhile."""
    if gpus == 1:
        return 0.0
    one = exchanged_bytes(rollout, gpus) / (link.bytes * link.share) + 2 * card.latency
    return rollout.passes * rollout.model.layers * one


def speed_up(rollout: Rollout, gpus: int, card: Card, link: Link) -> float:
    """How many times faster than one GPU a chunk is denoised."""
    taken = compute_seconds(rollout, gpus, card) + exchange_seconds(rollout, gpus, card, link)
    return compute_seconds(rollout, 1, card) / taken


def table(header: Sequence[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose first two columns are words."""
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    return [*lines, *["| " + " | ".join(row) + " |" for row in rows]]


def work_rows() -> list[list[str]]:
    rows = []
    for rollout in ROLLOUTS:
        times = rollout.passes * rollout.model.layers
        parts = [linear_operations(rollout), attention_operations(rollout), text_operations(rollout)]
        rows.append(
            [rollout.name, rollout.model.name, str(rollout.frames), str(rollout.read)]
            + [f"{times * part / 1e12:.1f}" for part in (*parts, sum(parts))]
            + [f"{times * moved_bytes(rollout) / 1e9:.0f}", f"{cache_bytes(rollout, 1) / 2**30:.2f}"]
        )
    return rows


def exchange_rows() -> list[list[str]]:
    rows = []
    for rollout in ROLLOUTS:
        for gpus in GPUS[1:]:
            times = rollout.passes * rollout.model.layers
            by_heads, by_tokens = exchanged_bytes(rollout, gpus), exchanged_by_tokens(rollout, gpus)
            rows.append(
                [rollout.name, rollout.model.name, str(gpus), f"{by_heads / 1e6:.1f}", f"{times * by_heads / 1e9:.2f}"]
                + [f"{times * by_heads / (link.bytes * link.share) * 1e3:.0f}" for link in LINKS]
                + [f"{by_tokens / 1e6:.1f}", f"{by_tokens / by_heads:.1f}"]
            )
    return rows


def speed_rows(card: Card) -> list[list[str]]:
    rows = []
    for rollout in ROLLOUTS:
        for gpus in GPUS:
            compute = compute_seconds(rollout, gpus, card)
            whole = rollout.model.heads % gpus == 0
            rows.append(
                [rollout.name, rollout.model.name, str(gpus)]
                + [str(most_heads(rollout.model, gpus)) + ("" if whole else " at most")]
                + [f"{cache_bytes(rollout, gpus) / 2**30:.2f}", f"{compute * 1e3:.0f}"]
                + [f"{exchange_seconds(rollout, gpus, card, link) * 1e3:.0f}" for link in LINKS]
                + [f"{speed_up(rollout, gpus, card, link):.1f}" for link in LINKS]
            )
    return rows


def page(card: Card) -> str:
    """The whole file."""
    lines = [
        "# One video on several GPUs, by calculation",
        "",
        "Made by `python -m benchmarks.sequence_parallel`. **Nothing here is measured**, and the pack does not split a video",
        "over GPUs; [the page](../../docs/sequence-parallel.md) says what that would take. A chunk is three latent frames",
        "(12 pictures) at 832x480: four noisy passes and a clean one, without decoding.",
        "",
        "## A chunk on one GPU",
        "",
        *table(WORK, work_rows()),
        "",
        "## What the GPUs exchange",
        "",
        "Of the GPU with the most heads: what it gets of q, k and v, and what it gives of the result, of the tokens of the others.",
        "The last two columns are of a cache that is split by tokens: what is read has to be exchanged in every pass, so it grows",
        "with the window.",
        "",
        *table(EXCHANGE, exchange_rows()),
        "",
        "## What it would give",
        "",
        *table(SPEED, speed_rows(card)),
        "",
        "## Assumed",
        "",
        *[f"- {each}" for each in assumptions(card)],
        "",
    ]
    return "\n".join(lines)


def assumptions(card: Card) -> list[str]:
    links = "; ".join(f"{link.name} with {link.bytes / 1e9:.0f} GB/s each way" for link in LINKS)
    return [
        f"{card.name}: {card.operations / 1e12:.0f} TFLOP/s in bf16 and {card.memory / 1e12:.2f} TB/s of memory on paper. Products "
        f"and attention reach {card.matrix_share:.0%} where every multiprocessor has work, moving reaches {card.memory_share:.0%}.",
        f"Work comes in tiles of {TILE} rows by {TILE} columns (for attention: {TILE} queries of a head), in whole waves over "
        f"{card.multiprocessors} multiprocessors. A quarter of the tokens is therefore not a quarter of the time.",
        f"{links}, on paper; {LINKS[0].share:.0%} of it is reached, and an exchange takes {card.latency * 1e6:.0f} microseconds "
        "beside its bytes. There are two a layer and pass, and nothing is computed meanwhile. PCIe has 16 lanes a GPU, with no "
        "switch or socket between.",
        f"Between linears and attentions {MOVED} activations a block are read or written (the compiled functions). Launches take "
        f"{card.launch * 1e6:.0f} microseconds of the CPU each, {KERNELS} a block and {EXCHANGE_KERNELS} more where GPUs exchange; "
        "a pass takes no less than these.",
        "Where the heads do not divide, the GPU with the most is waited for.",
        "Not in it: the decoder, which stays on one GPU, the sampler's steps, turning and committing the cache, first chunks.",
    ]


def main() -> int:
    text = page(Card())
    RESULT.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
