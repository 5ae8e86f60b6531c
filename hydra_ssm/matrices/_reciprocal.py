"""1 / D as a short sum of exponentials of D, which makes a matrix of reciprocals one of low rank."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

SPAN = 1e7  # largest ratio of two denominators between which the relative error is bounded


def exponents_and_weights(tolerance: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """s and w with |sum_k w_k exp(-s_k D) - 1 / D| < tolerance / D for 1 <= D <= SPAN, all of them positive.

    The derivative by D is as near, to within tolerance / D^2. In the dtype of `like` and on its device, without a
    copy from the host, which a CUDA graph could not capture.
    """
    low, first, step, count = _rule(tolerance)
    t = first + step * torch.arange(count, dtype=like.dtype, device=like.device)
    s = torch.cat([*(like.new_full((1,), node) for node, _ in low), t.exp()])
    w = torch.cat([*(like.new_full((1,), weight) for _, weight in low), t.exp() * step])
    return s, w


@lru_cache(maxsize=64)
def _rule(tolerance: float) -> tuple[tuple[tuple[float, float], ...], float, float, int]:
    """The terms of the sum: pairs (s, w), then s = exp t and w = step s for t = first, first + step, ... (count).

    About ln(SPAN) ln(8 / tolerance) / 10 of them: the trapezoidal rule for 1 / D = int exp(t - D exp t) dt, whose error
    falls geometrically with its step. To the right the integrand vanishes doubly exponentially, to the left as exp t
    alone: all nodes with s < z / SPAN are replaced by the few of the Gaussian rule that has their moments.
    """
    step = _step(tolerance)
    last = math.log(math.log(1 / tolerance) + math.log(math.log(1 / tolerance)))
    best: tuple[float, float, tuple[tuple[float, float], ...]] = (math.inf, 0.0, ())
    for count in range(1, 9):
        nodes, weights = _tail(step, count)
        reach = _reach(step, nodes, weights, tolerance / 2)
        cost = count - math.log(reach) / step if reach else math.inf
        if cost < best[0]:
            scale = reach / SPAN
            low = zip((scale * nodes).tolist(), (scale * weights).tolist(), strict=True)
            best = cost, math.log(scale), tuple(low)
    _, first, pairs = best
    return pairs, first, step, math.ceil((last - first) / step) + 1


# As torch.compiler.assume_constant_result does, which imports the compiler for it.
_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step(tolerance: float) -> float:
    """The largest step whose error by discretisation is half of what is allowed, of the derivative, too.

    Poisson summation: the relative error of 1 / D is 2 |Gamma(1 + i y)|, y = 2 pi / step, that of 1 / D^2 is
    2 |Gamma(2 + i y)|, y times as large, |Gamma(1 + i y)|^2 = pi y / sinh(pi y); later harmonics are far smaller.
    """
    step = 1.0
    while True:
        y = 2 * math.pi / step
        error = 2 * math.sqrt(2 * math.pi * y) * math.exp(-math.pi * y / 2)
        if y * error < tolerance / 2:
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
    slope = (D[:, 0] ** 2 * (exact @ v - found @ nodes)).abs() < tolerance
    good = int((value & slope).long().cumprod(0).sum())
    return float(D[good - 1]) if good else 0.0
