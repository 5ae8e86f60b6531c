"""Products with sums of exp(l - s (a_i + b_j)): matrices of low rank, whose factors are not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd import closed_form

SMALL = 1 << 20  # elements of factors that are computed together whatever the size of x


def exponential_sum(alpha: Tensor, beta: Tensor, scale: Tensor, exponents: Tensor, x: Tensor) -> Tensor:
    """y_i = sum_jdk exp(2 l_dk - s_k (alpha_di + beta_dj)) x_j, differentiable once.

    Args:
        alpha, beta: (n, d, L) at least 0, float32 or more.
        scale: l (n, d, K), constants, so that exp l is the largest entry of either factor.
        exponents: s (K,), positive.
        x: (n, L, P). The factors are rounded to its dtype, and all products are in it.

    Time O(L d K P). A few terms d are taken at a time, so that the factors take no more memory than a few x, and found
    again for the gradient.
    """
    return _Sum.apply(alpha, beta, scale, exponents, x)


def _factor(angle: Tensor, scale: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(l - s a) (n, d K, L)."""
    wide = torch.addcmul(scale[..., None], angle[:, :, None], s[:, None], value=-1)
    return wide.exp_().to(dtype).flatten(1, 2)


def _at_once(x: Tensor, terms: int) -> int:
    """How many d together: factors of up to four times the numbers of x."""
    return max(1, 4 * x.shape[2] // terms, SMALL // (x.shape[0] * x.shape[1] * terms))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: Tensor, scale: Tensor, s: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, beta, scale, s, x)
        y = torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            size = _at_once(x, len(s))
            for a, b, l in zip(*(t.split(size, 1) for t in (alpha, beta, scale)), strict=True):  # noqa: E741
                state = _factor(b, l, s, x.dtype) @ x
                y.baddbmm_(_factor(a, l, s, x.dtype).mT, state)
        return y

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
        alpha, beta, scale, s, x = ctx.saved_tensors
        dx, dalpha, dbeta = torch.zeros_like(x), [], []
        size = _at_once(x, len(s))
        for a, b, l in zip(*(t.split(size, 1) for t in (alpha, beta, scale)), strict=True):  # noqa: E741
            rows, columns = _factor(a, l, s, x.dtype), _factor(b, l, s, x.dtype)
            state, adjoint = columns @ x, rows @ grad
            dx.baddbmm_(columns.mT, adjoint)
            dalpha.append(_angle_grad(rows, state @ grad.mT, s))
            dbeta.append(_angle_grad(columns, adjoint @ x.mT, s))
        return torch.cat(dalpha, 1), torch.cat(dbeta, 1), None, None, dx


def _angle_grad(factor: Tensor, grad: Tensor, s: Tensor) -> Tensor:
    """Of a (n, d, L), where the factor is exp(l - s a) (n, d K, L) and its gradient is given."""
    return -torch.einsum("ndkl,k->ndl", factor.mul(grad).unflatten(1, (-1, len(s))).to(s.dtype), s)
