"""1 / D as a short sum of exponentials of D, which makes a matrix of reciprocals one of low rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

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


Rule = tuple[tuple[tuple[float, float], ...], float, float, int]


def _rule(tolerance: float) -> Rule:
    return _computed_rule(tolerance)


# As torch.compiler.assume_constant_result does, which imports the compiler for it.
_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
def _computed_rule(tolerance: float) -> Rule:
    """The terms of the sum: pairs (s, w), then s = exp t and w = step s for t = first, first + step, ... (count).

    About ln(SPAN) ln(8 / tolerance) / 10 of them: the trapezoidal rule for 1 / D = int exp(t - D exp t) dt, whose error
    falls geometrically with its step. To the right the integrand vanishes doubly exponentially, to the left as exp t
    alone: all nodes with s < z / SPAN are replaced by the few of the Gaussian rule that has their moments. Numbers of
    Python's: while torch traces, tensors have no values.
    """
    step = _step(tolerance)
    last = math.log(math.log(1 / tolerance) + math.log(math.log(1 / tolerance)))
    masses = [math.exp(-step * n) for n in range(1, int(60 / step))]
    best: tuple[float, float, list[tuple[float, float]]] = (math.inf, 0.0, [])
    for pairs in _gauss([(v, step * v) for v in masses], 8):
        reach = _reach(step, masses, pairs, tolerance / 2)
        cost = len(pairs) - math.log(reach) / step if reach else math.inf
        if cost < best[0]:
            scale = reach / SPAN
            best = cost, math.log(scale), [(scale * node, scale * weight) for node, weight in pairs]
    _, first, low = best
    return tuple(low), first, step, math.ceil((last - first) / step) + 1


def _step(tolerance: float) -> float:
    """The largest step whose error by discretisation is half of what is allowed, of the derivative, too.

    Poisson summation: the relative error of 1 / D is 2 |Gamma(1 + i y)|, y = 2 pi / step, that of 1 / D^2 is
    2 |Gamma(2 + i y)|, y times as large, |Gamma(1 + i y)|^2 = pi y / sinh(pi y); later harmonics are far smaller.
    """
    step = 1.0
    while True:
        y = 2 * math.pi / step
        if y * 2 * math.sqrt(2 * math.pi * y) * math.exp(-math.pi * y / 2) < tolerance / 2:
            return step
        step *= 0.99


def _gauss(measure: list[tuple[float, float]], most: int) -> Iterator[list[tuple[float, float]]]:
    """Gaussian rules of 1, 2, ... `most` (node, weight) for masses (place, mass) between 0 and 1.

    By the recurrence of the orthonormal polynomials (Stieltjes' procedure); the zeros of one lie between those of the
    next.
    """
    total = math.fsum(mass for _, mass in measure)
    shift: list[float] = []  # b_n p_n = (v - a_n) p_{n-1} - b_{n-1} p_{n-2}: a_n
    norm = [0.0]  # and b_n

    def polynomials(v: float) -> list[float]:
        found = [0.0, total**-0.5]
        for a, b, c in zip(shift, norm, norm[1:], strict=False):
            found.append(((v - a) * found[-1] - b * found[-2]) / c)
        return found[1:]

    zeros: list[float] = []
    for _ in range(most):
        values = [(v, mass, polynomials(v)) for v, mass in measure]
        shift.append(math.fsum(mass * v * p[-1] ** 2 for v, mass, p in values))
        before = norm[-1]
        rest = [(v - shift[-1]) * p[-1] - (before * p[-2] if len(p) > 1 else 0.0) for v, _, p in values]
        norm.append(math.sqrt(math.fsum(mass * r**2 for (_, mass, _), r in zip(values, rest, strict=True))))
        zeros = [_zero(lambda v: polynomials(v)[-1], *ends) for ends in pairwise([0.0, *zeros, 1.0])]
        yield [(zero, 1 / math.fsum(p**2 for p in polynomials(zero)[:-1])) for zero in zeros]


def _zero(f: Callable[[float], float], low: float, high: float) -> float:
    rising = f(high) > 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (f(middle) > 0) == rising else (middle, high)
    return (low + high) / 2


def _reach(step: float, masses: list[float], pairs: list[tuple[float, float]], tolerance: float) -> float:
    """The largest D <= 8 up to which sum w exp(-D v) is the same for the rule and the masses, relative to 1 / D."""
    reach = 0.0
    for D in (8 * 0.95**n for n in range(100, -1, -1)):
        terms = [(v, step * v * math.exp(-D * v)) for v in masses]
        terms += [(v, -w * math.exp(-D * v)) for v, w in pairs]
        value, slope = math.fsum(t for _, t in terms), math.fsum(v * t for v, t in terms)
        if max(abs(D * value), abs(D * D * slope)) > tolerance:
            break
        reach = D
    return reach
