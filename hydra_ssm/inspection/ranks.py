"""Numerical ranks of the blocks of a matrix, and what each class promises of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..matrices import LowRank, StructuredMatrix
from ..matrices.semiseparable import Triangles


class Ranks(NamedTuple):
    """Largest numerical rank of a block below the diagonal, of one above it, and of the whole matrix; (...) int64."""

    below: Tensor
    above: Tensor
    whole: Tensor


class Promise(NamedTuple):
    """Largest ranks that a class allows, as in `Ranks`; None where there is no bound but the size."""

    below: int | None
    above: int | None
    whole: int | None

    def __str__(self) -> str:
        if self.whole is not None:
            return f"at most {self.whole} everywhere"
        if self.below is None and self.above is None:
            return "none"
        if self.below == self.above:
            return f"at most {self.below} below and above"
        sides = (("below", self.below), ("above", self.above))
        return ", ".join(f"{'zero' if n == 0 else f'at most {n}'} {side}" for side, n in sides)


def rank(
    M: Tensor, *, diagonal: bool = False, cuts: Sequence[int] | None = None, tolerance: float | None = None
) -> Ranks:
    """Numerical ranks of M (..., L, L).

    A block strictly below the diagonal lies in one of the corners M[k:, :k], a block strictly above it in one of
    M[:k, k:]: the largest rank of the corners, over the cuts k, is the largest of any block. M is quasiseparable of
    order N where both are at most N. With `diagonal` the corners are M[k:, :k + 1] and M[:k + 1, k:]: M is
    semiseparable of order N where it is lower triangular and the first are at most N.

    Args:
        diagonal: let blocks reach the diagonal.
        cuts: where to look, for the sake of time; None: everywhere.
        tolerance: singular values count that are above it, relative to the Frobenius norm of the triangle (for the
            whole: of M). None: L times the precision of M's dtype.

    Raises:
        ValueError: M is not square or not of finite numbers, or a cut lies outside.
        TypeError: M is not floating point.
    """
    if M.ndim < 2 or M.shape[-2] != M.shape[-1] or M.shape[-1] == 0:
        raise ValueError(f"M must be square, (..., L, L), got {tuple(M.shape)}")
    if not M.is_floating_point():
        raise TypeError(f"M must be floating point, got {M.dtype}")
    if not M.isfinite().all():
        raise ValueError(f"M must be finite, {int((~M.isfinite()).sum())} of its {M.numel()} entries are not")
    L = M.shape[-1]
    places = range(0 if diagonal else 1, L) if cuts is None else cuts
    if any(not (0 if diagonal else 1) <= k < L for k in places):
        raise ValueError(f"cuts must be at least {0 if diagonal else 1} and below {L}, got {list(places)}")
    tolerance = L * torch.finfo(M.dtype).eps if tolerance is None else tolerance
    M = M.detach().to(torch.float64)
    reach = int(diagonal)
    whole = _rank(M, tolerance * torch.linalg.matrix_norm(M))
    below = _largest(M.tril(reach - 1), places, reach, tolerance)
    return Ranks(below, _largest(M.triu(1 - reach).mT, places, reach, tolerance), whole)


def promise(matrix: type[StructuredMatrix], order: int) -> Promise:
    """The ranks that a class of this order (`d_state`) allows.

    Bounds are those of the class, whatever its parameters: attention, Cauchy and Toeplitz have none, though a matrix of
    theirs may be numerically of low rank.
    """
    if issubclass(matrix, Triangles):
        below, above = (order if way in matrix.directions else 0 for way in ("causal", "anticausal"))
        return Promise(below, above, None)
    if issubclass(matrix, LowRank):
        return Promise(order, order, order)
    return Promise(None, None, None)


def _largest(lower: Tensor, cuts: Sequence[int], reach: int, tolerance: float) -> Tensor:
    """Largest rank of the corners of lower triangular matrices."""
    L = lower.shape[-1]
    threshold = tolerance * torch.linalg.matrix_norm(lower)
    found = torch.zeros(lower.shape[:-2], dtype=torch.long, device=lower.device)
    # From the largest corner to the smallest: where what is left is too small to hold a higher rank, it is over.
    for k in sorted(cuts, key=lambda k: abs(2 * k + reach - L)):
        if min(L - k, k + reach) <= (int(found.min()) if found.numel() else 0):
            break
        found = torch.maximum(found, _rank(lower[..., k:, : k + reach], threshold))
    return found


def _rank(M: Tensor, threshold: Tensor) -> Tensor:
    return (torch.linalg.svdvals(M) > threshold[..., None]).sum(-1)
