"""Products with sums of exp(l - s (a_i + b_j)): matrices of low rank, whose factors are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from .._autograd import closed_form, without_autocast
from ._parts import AT_ONCE, cuts, on_cpu, parts
from ._precision import at_least_float32
from .fusion import fusible


def exponential_sum(alpha: Tensor, beta: Tensor, scale: Tensor, exponents: Tensor, x: Tensor) -> Tensor:
    """y_i = sum_jdk exp(2 l_dk - s_k (alpha_di + beta_dj)) x_j, differentiable once.

    Args:
        alpha, beta: (n, d, L) at least 0, float32 or more.
        scale: l (n, d, K), constants, so that exp l is the largest entry of either factor.
        exponents: s (K,), positive.
        x: (n, L, P). The factors are rounded to its dtype, and all products are in it.

    Time O(n L d K P). The factors are computed in parts that take no more memory than x or a constant, and found again
    for the gradient.
    """
    return _Sum.apply(alpha, beta, scale, exponents, x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: Tensor, scale: Tensor, s: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, beta, scale, s, x)
        y = at_least_float32(torch.zeros_like(x))  # several d may add to it
        with without_autocast(x.device):
            for n, terms, tokens in _parts(alpha, x, s):
                factor = partial(_factor, scale[n, terms], s, x.dtype)
                state = _added(factor(beta[n, terms, t]) @ x[n, t] for t in tokens).to(x.dtype)
                for t in tokens:
                    y[n, t].add_(factor(alpha[n, terms, t]).mT @ state)
        return y.to(x.dtype)

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
        alpha, beta, scale, s, x = ctx.saved_tensors
        dx, dalpha, dbeta = at_least_float32(torch.zeros_like(x)), torch.zeros_like(alpha), torch.zeros_like(beta)
        for n, terms, tokens in _parts(alpha, x, s):
            factor = partial(_factor, scale[n, terms], s, x.dtype)
            rows, columns = (_found(factor, angle[n, terms], tokens) for angle in (alpha, beta))
            state = _added(columns(t) @ x[n, t] for t in tokens).to(x.dtype)
            adjoint = _added(rows(t) @ grad[n, t] for t in tokens).to(x.dtype)
            for t in tokens:
                own = columns(t)
                dx[n, t].add_(own.mT @ adjoint)
                dbeta[n, terms, t] = _angle_grad(own, adjoint @ x[n, t].mT, s)
                dalpha[n, terms, t] = _angle_grad(rows(t), state @ grad[n, t].mT, s)
        return dalpha, dbeta, None, None, dx.to(x.dtype)


def _parts(alpha: Tensor, x: Tensor, s: Tensor) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Which n, which d, and cuts of their tokens: the factors of all d if tokens are few at a time, or the reverse."""
    n, d, length = alpha.shape
    if on_cpu(x):
        yield from ((own, slice(None), tokens) for own, tokens in parts(x, d * len(s)))
    else:
        for terms in cuts(d, max(x.shape[2] // len(s), AT_ONCE // (n * length * len(s)))):
            yield slice(None), terms, [slice(None)]


def _found(factor: Callable[[Tensor], Tensor], angle: Tensor, tokens: list[slice]) -> Callable[[slice], Tensor]:
    """The factor at the tokens of a cut: computed once if there is one cut, each time if there are more."""
    if len(tokens) > 1:
        return lambda t: factor(angle[..., t])
    once = factor(angle)
    return lambda t: once


@fusible
def _factor(scale: Tensor, s: Tensor, dtype: torch.dtype, angle: Tensor) -> Tensor:
    """exp(l - s a) (n, d K, L)."""
    wide = torch.addcmul(scale[..., None], angle[:, :, None], s[:, None], value=-1)
    return wide.exp_().to(dtype).flatten(1, 2)


@fusible
def _angle_grad(factor: Tensor, grad: Tensor, s: Tensor) -> Tensor:
    """Of a (n, d, L), where the factor is exp(l - s a) (n, d K, L) and its gradient is given."""
    return factor.mul(grad).unflatten(1, (-1, len(s))).to(s.dtype).mul(-s[:, None]).sum(2)


def _added(products: Iterable[Tensor]) -> Tensor:
    """Their sum, in float32 at least if there are several."""
    return reduce(lambda total, part: total.to(torch.promote_types(total.dtype, torch.float32)) + part, products)
