"""The calculation of docs/sequence-parallel.md against sums by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks import sequence_parallel as sp
from benchmarks.sequence_parallel import LARGE, SMALL, Card, Link, Model, Rollout

PAGE = sp.RESULT.parents[2] / "docs" / "sequence-parallel.md"
# a card whose time is its operations: no memory, no launches, no whole waves
EVEN = Card(operations=1.0, matrix_share=1.0, memory=math.inf, multiprocessors=1, launch=0.0, latency=0.0)


def test_operations_of_a_block_of_the_small_model():
    """Three frames of 1560 tokens, multiplications and additions, matrix by matrix."""
    rollout, n = Rollout("", SMALL, 3, 21), 3 * 1560
    square, wide = 2 * n * 1536 * 1536, 2 * n * 1536 * 8960
    assert sp.linear_operations(rollout) == square * (4 + 2) + wide * 2
    scores = 12 * (2 * n * 128 * 21 * 1560)  # head by head: q.k, and then the values as often
    assert sp.attention_operations(rollout) == 2 * scores
    assert sp.text_operations(rollout) == 2 * 12 * (2 * n * 128 * 512)


def test_the_cache_is_what_the_table_of_presets_says():
    """README: 5.7 GiB for self_forcing on the 1.3B, of which 0.09 are the text's."""
    assert sp.cache_bytes(Rollout("", SMALL, 3, 21), 1) == 30 * 2 * 21 * 1560 * 1536 * 2
    assert sp.cache_bytes(Rollout("", LARGE, 4, 8), 8) * 8 == 40 * 2 * 8 * 1560 * 5120 * 2


@pytest.mark.parametrize(("gpus", "heads"), [(2, [6, 6]), (3, [4, 4, 4]), (8, [2, 2, 2, 2, 1, 1, 1, 1])])
def test_exchanged_is_what_changes_its_gpu(gpus, heads):
    """Counted number by number on a small model: each token lies on one GPU, each head is attended to on one."""
    rollout = Rollout("", Model("", 12, 16, 1, 12), 1, 4)
    where_head = [gpu for gpu, count in enumerate(heads) for _ in range(count)]
    where_token = [token * gpus // 1560 for token in range(1560)]
    most = max(range(gpus), key=lambda gpu: heads[gpu])
    moved = sum(1 for token in where_token for head in where_head if head == most and token != most)
    assert sp.exchanged_bytes(rollout, gpus) == 4 * moved * 2  # q, k and v come, and the result goes, two bytes each
    assert sp.exchanged_by_tokens(rollout, gpus) == (2 + 2 * 4) * moved * 2


def test_work_that_divides_takes_its_share_of_the_time():
    rollout = Rollout("", Model("", 1024, 4096, 3, 8), 4, 8, passes=2)
    alone = sp.compute_seconds(rollout, 1, EVEN)
    operations = sp.linear_operations(rollout) + sp.attention_operations(rollout) + sp.text_operations(rollout)
    # tiles of 128 rows: 6240 tokens are 48.75 of them
    assert alone == pytest.approx(2 * 3 * operations, rel=1e-9)
    assert sp.compute_seconds(rollout, 8, EVEN) == pytest.approx(alone / 8, rel=1e-9)
    free = Link("", math.inf)
    assert sp.speed_up(rollout, 8, EVEN, free) == pytest.approx(8)
    attention, rest = sp.attention_operations(rollout), sp.linear_operations(rollout) + sp.text_operations(rollout)
    by_hand = (attention + rest) / (attention * 3 / 8 + rest / 3)  # a GPU has three heads of eight
    assert sp.speed_up(rollout, 3, EVEN, free) == pytest.approx(by_hand)


def test_whole_waves_by_hand():
    """The 14B's q on 585 tokens: 5 by 40 tiles are two waves of 132, so 200 tiles take as long as 264."""
    card = Card(matrix_share=1.0)
    assert sp.fill(200, card) == pytest.approx(200 / 264)
    assert sp.product_seconds(585, 5120, 5120, card) == pytest.approx(2 * 585 * 5120**2 / 989e12 * 264 / 200)


def test_an_exchange_takes_its_bytes_and_twice_the_latency():
    rollout, link = Rollout("", SMALL, 3, 21), Link("", 1e9, 0.5)
    by_hand = 4 * (4680 / 2) * 768 * 2 / 0.5e9 + 2 * 20e-6
    assert sp.exchange_seconds(rollout, 2, Card(), link) == pytest.approx(5 * 30 * by_hand)
    assert sp.exchange_seconds(rollout, 1, Card(), link) == 0


def test_launches_are_the_least_that_a_pass_takes():
    slow = Card(launch=1.0)
    rollout = Rollout("", SMALL, 3, 21)
    assert sp.compute_seconds(rollout, 1, slow) == 5 * 30 * 17
    assert sp.compute_seconds(rollout, 2, slow) == 5 * 30 * 24


def test_the_written_table_is_the_one_that_is_made():
    assert sp.RESULT.read_text(encoding="utf-8") == sp.page(Card()), "run `python -m benchmarks.sequence_parallel`"
    for rollout in sp.ROLLOUTS:
        for link in sp.LINKS:
            assert all(0 < sp.speed_up(rollout, gpus, Card(), link) < gpus for gpus in (2, 4, 8))


def test_the_page_says_what_the_table_says():
    text = PAGE.read_text(encoding="utf-8")
    for rollout in sp.ROLLOUTS:
        faster = [f"{sp.speed_up(rollout, gpus, Card(), link):.1f}" for link in sp.LINKS[:2] for gpus in (2, 4, 8)]
        assert f"| {rollout.name} | {rollout.model.name} | {' | '.join(faster)} |" in text
