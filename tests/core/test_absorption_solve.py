"""The arithmetic of a correction against slower ways: merged parts, statistics, the solve, the choice of ridge and layers."""

from __future__ import annotations

import math

import pytest
import torch

from adastate_core.absorption.absorber import choose
from adastate_core.absorption.collector import Collector
from adastate_core.absorption.lse import WAYS, attend_part, merge, plain, rows
from adastate_core.absorption.moments import Moments
from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.absorption.solve import Fit, fit, nothing, residual, solve


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", [name for name in WAYS if name in ("flash, cpu", "plain")])
@pytest.mark.parametrize(("queries", "near", "far", "heads"), [(7, 3, 11, 2), (1, 1, 1, 1), (1030, 40, 9, 3)])
def test_merged_parts_are_one_softmax(way, queries, near, far, heads, monkeypatch):
    monkeypatch.setattr("adastate_core.absorption.lse.fastest_way", lambda *_: way)
    q, k, v = (
        draw(2, queries, heads * 8),
        draw(2, near + far, heads * 8, seed=1),
        draw(2, near + far, heads * 8, seed=2),
    )
    parts = [attend_part(q, k[:, s], v[:, s], heads) for s in (slice(0, near), slice(near, None))]
    whole = merge(*parts)
    scores = torch.einsum("bqhd,bkhd->bhqk", *(t.double().unflatten(-1, (heads, 8)) for t in (q, k))) / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double().unflatten(-1, (heads, 8))).flatten(2)
    torch.testing.assert_close(rows(whole).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(whole.lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-6)


def test_the_plain_way_works_in_half_precision():
    q, k, v = (draw(1, 2, 5, 16, seed=s).bfloat16() for s in range(3))
    out, lse = plain(q, k, v)
    expected, sums = plain(q.float(), k.float(), v.float())
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, sums)


def activations(count: int, width: int, rank: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of local and full output, related by a hidden linear map, a constant and noise."""
    local = draw(count, width, seed=seed) + 0.7
    if rank is not None:
        local = draw(count, rank, seed=seed) @ draw(rank, width, seed=9)
    missing = local @ draw(width, width, seed=5) / width + draw(width, seed=6) + 0.1 * draw(count, width, seed=seed + 1)
    return local, local + missing


def moments_of(local: torch.Tensor, full: torch.Tensor, blocks: int, pieces: int = 3) -> Moments:
    moments = Moments.empty(local.shape[1], blocks)
    for a, b in zip(local.chunk(pieces), full.chunk(pieces), strict=True):
        moments.add(a, b)
    return moments


def direct_fit(local: torch.Tensor, full: torch.Tensor, blocks: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares on the stored rows: the ridge as extra rows, the constant as an unpunished column of ones."""
    local, missing = local.double(), (full - local).double()
    size = local.shape[1] // blocks
    matrices, constants = [], []
    for h in range(blocks):
        x, y = (t[:, h * size : (h + 1) * size] for t in (local, missing))
        weight = math.sqrt(ridge * float((x - x.mean(0)).square().sum()) / size)
        tall = torch.cat(
            [torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([weight * torch.eye(size), torch.zeros(size, 1)], 1)]
        )
        known = torch.cat([y, torch.zeros(size, size)])
        found = torch.linalg.lstsq(tall, known, driver="gelsd", rcond=None if ridge else 1e-4).solution
        matrices.append(found[:size])
        constants.append(found[size])
    return torch.stack(matrices), torch.cat(constants)


@pytest.mark.parametrize("ridge", [0.0, 0.03, 1.0, 10.0])
@pytest.mark.parametrize(
    ("count", "width", "blocks", "rank"), [(300, 12, 1, None), (300, 12, 3, None), (80, 16, 2, 3), (6, 16, 1, None)]
)
def test_the_solve_is_the_direct_fit(count, width, blocks, rank, ridge):
    """semantics: Absorption: the solve."""
    local, full = activations(count, width, rank)
    found = solve(moments_of(local, full, blocks), ridge)
    matrix, constant = direct_fit(local, full, blocks, ridge)
    applied = found.apply(local[None])[0]
    size = width // blocks
    predicted = (
        torch.cat([local.double()[:, h * size : (h + 1) * size] @ matrix[h] for h in range(blocks)], 1) + constant
    )
    # with too few rows and no ridge many maps fit equally well; what they give on the rows is the same
    torch.testing.assert_close(applied.double() - local, predicted, atol=2e-3, rtol=2e-3)
    if ridge and rank is None:
        torch.testing.assert_close(found.matrix.double(), matrix, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.constant.double(), constant, atol=1e-3, rtol=1e-3)


def test_rows_of_one_value_and_no_rows_are_no_trouble():
    same = torch.ones(10, 4)
    found = solve(moments_of(same, same + 2, 1), 0.1)
    torch.testing.assert_close(found.apply(same[None])[0], same + 2)
    assert not solve(Moments.empty(4, 1), 0.1).constant.any()
    assert residual(Moments.empty(4, 1), nothing(Moments.empty(4, 1))) == 0


@pytest.mark.parametrize(("blocks", "rank"), [(1, None), (4, None), (1, 3)])
def test_the_residual_is_the_error_on_stored_rows(blocks, rank):
    local, full = activations(200, 16)
    unseen_local, unseen_full = activations(90, 16, seed=50)
    found = solve(moments_of(local, full, blocks), 0.3, rank)
    error = (unseen_full - found.apply(unseen_local[None])[0]).square().sum() / unseen_full.square().sum()
    assert residual(moments_of(unseen_local, unseen_full, blocks), found) == pytest.approx(float(error), rel=1e-3)
    assert (found.matrix is None) == (rank is not None)


def test_a_low_rank_of_full_rank_changes_nothing_and_a_lower_one_is_the_nearest():
    local, full = activations(400, 10)
    moments = moments_of(local, full, 1)
    whole = solve(moments, 0.1)
    assert torch.equal(solve(moments, 0.1, rank=10).matrix, whole.matrix)
    cut = solve(moments, 0.1, rank=4).whole()[0]
    u, s, v = torch.linalg.svd(whole.matrix[0].double())
    torch.testing.assert_close(cut.double(), (u[:, :4] * s[:4]) @ v[:4], atol=1e-5, rtol=1e-4)


def test_the_ridge_is_chosen_on_held_out_rows_and_doing_nothing_wins_where_nothing_helps():
    ridges = AbsorptionSettings().ridges(4)
    assert ridges[0] == math.inf and list(ridges) == sorted(ridges, reverse=True)
    seen, held = (moments_of(*activations(n, 16, seed=s), 1) for n, s in ((500, 0), (200, 70)))
    found = fit(seen, held, ridges)
    errors = {r: residual(held, solve(seen, r)) for r in ridges}
    assert found.residual == min(errors.values()) == errors[found.ridge] < 0.2 * found.discrepancy
    both = seen.merged(held)
    assert torch.equal(found.correction.matrix, solve(both, found.ridge).matrix)
    noise = [draw(60, 16, seed=s) for s in range(4)]
    unrelated = fit(
        moments_of(noise[0], noise[0] + 0.2 * noise[1], 1), moments_of(noise[2], noise[2] + 0.2 * noise[3], 1), ridges
    )
    assert math.isinf(unrelated.ridge) and not unrelated.correction.whole().any()


def test_only_whole_chunks_count_and_the_last_is_held_out():
    """semantics: Absorption: what is collected."""
    collector = Collector([0], 8, 2, torch.device("cpu"))
    chunks = [
        [(draw(1, 10, 8, seed=10 * c + p), draw(1, 10, 8, seed=10 * c + p + 5)) for p in range(2)] for c in range(3)
    ]
    for number, passes in enumerate(chunks):
        collector.start_chunk()
        collector.add(0, *passes[1])  # a chunk that is interrupted
        collector.start_chunk()
        for one in passes:
            collector.add(0, *one)
        for _, join in [*collector.joins(), *collector.joins()]:  # a second time changes nothing
            join()
        collector.close_chunk()
        if number == 0:
            fifth = [4, 9]
            held = torch.cat([local[0, fifth] for local, _ in passes])
            torch.testing.assert_close(collector.held_out[0].local, held.sum(0))
            assert float(collector.seen[0].rows) == 16
    seen = torch.cat([local[0] for passes in chunks[:2] for local, _ in passes])
    torch.testing.assert_close(collector.seen[0].local, seen.sum(0))
    assert float(collector.held_out[0].rows) == 20
    again = Collector([0], 8, 2, torch.device("cpu"))
    again.restore(collector.state())
    assert torch.equal(again.seen[0].gram, collector.seen[0].gram) and again.chunks == 3


def test_layers_are_chosen_by_score_and_then_by_index():
    """semantics: Absorption: the switch."""
    fits = {i: Fit(None, 1.0, r, d) for i, (r, d) in enumerate([(0.2, 0.9), (0.1, 0.1), (0.2, 0.3), (0.1, 0.5)])}
    assert choose(fits, AbsorptionSettings(ratio=0.75, select="residual"), 4) == (0, 1, 3)
    assert choose(fits, AbsorptionSettings(ratio=0.5, select="discrepancy"), 4) == (1, 2)
    assert choose(fits, AbsorptionSettings(ratio=0.5, select="explained"), 4) == (0, 3)
    assert choose(fits, AbsorptionSettings(ratio=0.49, select="residual"), 4) == (1,)
    changes = {0: 0.5, 1: 0.3, 2: 0.1, 3: 0.3}
    assert choose(fits, AbsorptionSettings(ratio=0.5), 4, changes) == (1, 2)
    assert choose(fits, AbsorptionSettings(ratio=0.5, select="saved", saved_layers=(3, 0, 2)), 4) == (0, 3)
