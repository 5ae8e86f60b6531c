"""1 / D as a short sum of exponentials of D, which makes a matrix of reciprocals one of low rank."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

SPAN = 1e7  # largest ratio of two denominators between which the relative error is bounded


@torch.compiler.assume_constant_result
@lru_cache(maxsize=64)
def exponents_and_weights(tolerance: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """s and w with |sum_k w_k exp(-s_k D) - 1 / D| < tolerance / D for 1 <= D <= SPAN, all of them positive.

    The derivative by D is as near, to within 3 tolerance / D^2. About ln(SPAN) ln(8 / tolerance) / 10 terms: the
    trapezoidal rule for 1 / D = int exp(t - D exp t) dt, which converges geometrically as its step shrinks. To the
    right the integrand vanishes doubly exponentially, to the left but as exp t: all its nodes with s < z / SPAN are
    replaced by the few of the Gaussian rule that has their moments.
    """
    step = _step(tolerance)
    last = math.log(math.log(1 / tolerance) + math.log(math.log(1 / tolerance)))
    least, first, low, low_weights = math.inf, 0.0, (), ()  # type: tuple[float, float, tuple[float, ...], tuple[float, ...]]
    for count in range(1, 9):
        nodes, weights = _tail(step, count)
        reach = _reach(step, nodes, weights, tolerance / 2)
        if reach and count - math.log(reach) / step < least:
            least, first = count - math.log(reach) / step, math.log(reach / SPAN)
            low, low_weights = tuple(nodes.tolist()), tuple(weights.tolist())
    grid = [first + n * step for n in range(math.ceil((last - first) / step) + 1)]
    s = [math.exp(first) * node for node in low] + [math.exp(t) for t in grid]
    w = [math.exp(first) * weight for weight in low_weights] + [step * math.exp(t) for t in grid]
    return tuple(s), tuple(w)


def _step(tolerance: float) -> float:
    """The largest step whose error by discretisation is half of what is allowed, for the derivative as well.

    Poisson summation: the relative error of 1 / D is 2 |Gamma(1 + i y)|, y = 2 pi / step, that of 1 / D^2 is
    2 |Gamma(2 + i y)|, |Gamma(1 + i y)|^2 = pi y / sinh(pi y); later harmonics are far smaller.
    """
    step = 1.0
    while True:
        y = 2 * math.pi / step
        error = 2 * math.sqrt(2 * math.pi * y) * math.exp(-math.pi * y / 2)
        if error < tolerance / 2 and y * error < 1.5 * tolerance:
            return step
        step *= 0.99


def _tail(step: float, count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gaussian rule for the masses step v at v = exp(-step n), n = 1, 2, ...

    By the Lanczos process: its tridiagonal matrix has the nodes as eigenvalues.
    """
    v = torch.exp(-step * torch.arange(1, int(60 / step), dtype=torch.float64, device="cpu"))
    vector = (step * v).sqrt()
    total = vector.norm()
    basis = [vector / total]
    for _ in range(count - 1):
        vector = v * basis[-1]
        for _ in range(2):  # twice is enough for orthogonality to all digits
            for known in basis:
                vector = vector - (vector @ known) * known
        basis.append(vector / vector.norm())
    Q = torch.stack(basis)
    nodes, vectors = torch.linalg.eigh((Q * v) @ Q.T)
    return nodes, (total * vectors[0]) ** 2


def _reach(step: float, nodes: Tensor, weights: Tensor, tolerance: float) -> float:
    """The largest z <= 8 so that both rules give sums of exp(-D v) that are equal for D <= z, relative to 1 / D."""
    D = torch.linspace(0.05, 8, 160, dtype=torch.float64, device="cpu")[:, None]
    v = torch.exp(-step * torch.arange(1, int(60 / step), dtype=torch.float64, device="cpu"))
    exact, found = step * v * torch.exp(-D * v), weights * torch.exp(-D * nodes)
    value = (D[:, 0] * (exact.sum(1) - found.sum(1))).abs() < tolerance
    slope = (D[:, 0] ** 2 * (exact @ v - found @ nodes)).abs() < 3 * tolerance
    good = int((value & slope).long().cumprod(0).sum())
    return float(D[good - 1]) if good else 0.0
