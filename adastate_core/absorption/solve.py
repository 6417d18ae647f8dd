"""The closed-form correction of one layer, and its error on rows that the fit has not seen.

r = full - local is fitted on local by least squares with a constant: M = (G + lambda I)^-1 C from centred G and C,
beta = mean(r) - mean(local) M, lambda = ridge * tr(G) / width of a block. The layer then computes o(local (I + M) + beta), where o
is its output projection. Fitting a change of o's weight instead would give the same (shared notes on ISPA, section 4.2).

With a prior M0 (prior.py) M = (G + lambda I)^-1 (C + lambda M0): the ridge draws M towards M0 and not towards 0, and an infinite
ridge is M0 itself. beta is the video's own in both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .moments import Moments

# eigenvalues of G smaller than this share of the largest one are only rounding
FLOOR = 1e-5


@dataclass(frozen=True)
class Correction:
    """`matrix` M [blocks, c, c] and `constant` beta [d], float32. To each row, row M + beta is added.

    A truncated M of one block is kept as `left` [1, d, r] and `right` [1, r, d] instead. Where each item of a batch has a
    correction of its own, all of them have a first dimension B (items.py).
    """

    constant: torch.Tensor
    matrix: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        """M [blocks, c, c], or [B, blocks, c, c]."""
        return self.left @ self.right if self.matrix is None else self.matrix

    def to(self, device: torch.device, dtype: torch.dtype) -> Correction:
        return Correction(*(None if t is None else t.to(device, dtype) for t in self.parts()))

    def parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.constant, self.matrix, self.left, self.right

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts() if t is not None)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [B, N, d] + rows M + beta, in the rows' dtype (the correction must have it)."""
        own = self.constant.dim() == 2
        constant = self.constant[:, None] if own else self.constant
        if self.matrix is None:
            return rows + (rows @ self.left.select(-3, 0)) @ self.right.select(-3, 0) + constant
        blocks = self.matrix.shape[-3]
        if blocks == 1:
            return rows + rows @ self.matrix.select(-3, 0) + constant
        parts = rows.unflatten(-1, (blocks, -1))
        return (
            rows
            + torch.einsum("bnhc,bhcd->bnhd" if own else "bnhc,hcd->bnhd", parts, self.matrix).flatten(2)
            + constant
        )


@functools.cache
def solving_device(device: torch.device) -> torch.device:
    """`device` if it can solve in float64, else the CPU (Apple's GPUs have no float64). This is tried once.

    The CPU is too slow to be used always. With one block a layer, 30 layers of 1536 channels with all their ridges take some 4e12
    operations at one instant, and 40 layers of 5120 channels take 50 times as many.
    """
    try:
        torch.linalg.cholesky_ex(torch.eye(1, dtype=torch.float64, device=device))
    except (RuntimeError, TypeError):
        return torch.device("cpu")
    return device


def nothing(moments: Moments) -> Correction:
    """M = 0 and beta = 0."""
    return Correction(torch.zeros_like(moments.local), torch.zeros_like(moments.gram))


def solve(moments: Moments, ridge: float, rank: int | None = None, prior: torch.Tensor | None = None) -> Correction:
    """The fit at one ridge, drawn towards `prior` M0 [blocks, c, c] or towards 0; an infinite ridge gives M0 with the constant that
    goes with it, or `nothing`. `rank` truncates M of a single block by its singular values.

    The solve is a float64 Cholesky on the moments' device if that can do it, else on the CPU; the correction lies where it was
    solved. With hardly any ridge it is the least-norm solution, because float32 sums leave directions that are only rounding.
    """
    moments = moments.to(solving_device(moments.rows.device))
    m = float(moments.rows)
    if m < 2 or (math.isinf(ridge) and prior is None):
        return nothing(moments)
    gram, cross, mean_local, mean_missing = centred(moments)
    target = None if prior is None else prior.to(gram.device, torch.float64)
    matrix = target if math.isinf(ridge) else ridged(gram, cross, ridge, target)
    pair = None
    if rank is not None and rank < matrix.shape[-1]:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:, None, :rank].sqrt()
        pair = u[:, :, :rank] * root, root.mT * v[:, :rank]
        matrix = pair[0] @ pair[1]
    constant = (mean_missing - mean_local @ matrix).flatten().float()
    if pair is not None:
        return Correction(constant, None, *(t.float().contiguous() for t in pair))
    return Correction(constant, matrix.float().contiguous())


def centred(moments: Moments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """G and C [blocks, c, c] about the means, and the means of local and missing rows [blocks, 1, c], all float64."""
    m, (blocks, size) = float(moments.rows), moments.gram.shape[:2]
    local, missing = (t.double().view(blocks, 1, size) / m for t in (moments.local, moments.missing))
    return moments.gram.double() - m * local.mT @ local, moments.cross.double() - m * local.mT @ missing, local, missing


def ridged(gram: torch.Tensor, cross: torch.Tensor, ridge: float, prior: torch.Tensor | None = None) -> torch.Tensor:
    """(G + lambda I)^-1 (C + lambda M0) of centred G and C [blocks, c, c], float64; without a `prior` M0 is 0."""
    size = gram.shape[-1]
    weight = (ridge * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / size)[:, None, None]
    regular = gram + weight * torch.eye(size, dtype=torch.float64, device=gram.device)
    known = cross if prior is None else cross + weight * prior
    factor, failed = torch.linalg.cholesky_ex(regular)
    if ridge < FLOOR or bool(failed.any()):
        return torch.linalg.pinv(regular, rtol=FLOOR, hermitian=True) @ known
    return torch.cholesky_solve(known, factor)


def residual(moments: Moments, correction: Correction) -> float:
    """sum ||r - local M - beta||^2 / sum ||full||^2 over the rows of `moments`; 0 if there are none."""
    energy = float(moments.full_energy)
    if energy <= 0:
        return 0.0
    place = solving_device(moments.rows.device)
    moments = moments.to(place)
    matrix, beta = correction.whole().to(place).double(), correction.constant.to(place).double()
    gram, cross = moments.gram.double(), moments.cross.double()
    local, missing = moments.local.double(), moments.missing.double()
    predicted = (local.view(len(matrix), 1, -1) @ matrix).flatten()
    error = float(moments.missing_energy) - 2 * (matrix * cross).sum() + (matrix * (gram @ matrix)).sum()
    error += 2 * beta @ predicted - 2 * beta @ missing + float(moments.rows) * beta @ beta
    return max(0.0, float(error)) / energy


@dataclass(frozen=True)
class Fit:
    """A layer's correction with the chosen `ridge` (None if the layer was not chosen). `residual` is the held-out error with the
    correction, and `discrepancy` the one without. `items`: (ridge, residual, discrepancy) of each item of a batch where each has
    its own (items.py). `towards`: whether the ridge drew it towards a prior."""

    correction: Correction | None
    ridge: float
    residual: float
    discrepancy: float
    items: tuple[tuple[float, float, float], ...] = ()
    towards: bool = False

    @property
    def explained(self) -> float:
        """Share of the discrepancy that the correction removes."""
        return 1 - self.residual / self.discrepancy if self.discrepancy > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """What was solved: the fits of all layers, by layer, and which of them were chosen. `changes`: by layer, how much the picture
    changes without its history, where the choice was made by that (sensitivity.py)."""

    chosen: tuple[int, ...]
    fits: dict[int, Fit] = field(repr=False)
    changes: dict[int, float] = field(default_factory=dict, repr=False)


def fit(
    seen: Moments,
    held_out: Moments,
    ridges: Sequence[float],
    rank: int | None = None,
    between: Moments | None = None,
    prior: torch.Tensor | None = None,
) -> Fit:
    """Choose the ridge with the least residual on `held_out`; the first in order wins ties. Then solve on all rows, those that lie
    `between` the two among them. With a `prior` M0 all ridges draw towards it; where several are tried, nothing is tried first."""
    place = solving_device(seen.rows.device)
    seen, held_out = seen.to(place), held_out.to(place)
    target = None if prior is None else prior.to(place)
    tried = [(ridge, target) for ridge in ridges]
    if target is not None and len(tried) > 1:
        tried.insert(0, (math.inf, None))
    best, least = tried[0], math.inf
    for one in tried:
        error = residual(held_out, solve(seen, one[0], rank, one[1]))
        if error < least:
            best, least = one, error
    whole = (seen if between is None else seen.merged(between.to(place))).merged(held_out)
    found = solve(whole, best[0], rank, best[1])
    return Fit(found, best[0], least, residual(held_out, nothing(held_out)), towards=best[1] is not None)
