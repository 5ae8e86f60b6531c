"""Products with the matrix sum_d cos(w q_id j) - cos(w k_jd i), of low rank where its angles stay small."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._autograd import closed_form, without_autocast
from ._parts import parts
from .fusion import fusible


def rank(angle: float, tolerance: float) -> int:
    """How many Chebyshev nodes interpolate cos(a t) - 1, |a| <= angle, -1 <= t <= 1, to the tolerance of its size.

    About `angle` and ten more. The error is at most 4 sum_{m >= rank} |J_m(angle)|, and Kapteyn's inequality bounds
    J_m(m sech b) by exp(m (tanh b - b)).
    """
    allowed = tolerance * min(1.0, max(angle**2, 1e-290)) / 8
    m = math.ceil(angle) + 2
    while True:
        b = math.acosh(m / angle) if angle > 0 else math.inf
        if b == math.inf or m * (math.tanh(b) - b) < math.log(allowed):
            return m
        m += 1


def cosines(q: Tensor, k: Tensor, x: Tensor, frequency: float, nodes: int) -> Tensor:
    """y_i = sum_jd (cos(w q_id j) - cos(w k_jd i)) x_j, w = frequency, differentiable once.

    q and k (n, L, d), x (n, L, P), all float32 or float64. Time O(n L nodes (d + P)); cosines are computed for some
    tokens at a time, so that they take no more memory than a few x or a constant, and found again for the gradient.
    """
    places, E = _interpolation(x.shape[1], nodes, x)
    return _Cosines.apply(q, k, x, places * (frequency / 2), E)


def _interpolation(length: int, nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Places t (nodes,) between 0 and length - 1, and E (length, nodes), with f(j) = sum_n E_jn f(t_n) for smooth f.

    E is the Lagrange basis of the Chebyshev nodes, written in angles, where it is the same for all lengths.
    """
    last = max(length - 1, 1)
    phi = (torch.arange(nodes, device=like.device, dtype=torch.float64) + 0.5) * (math.pi / nodes)
    psi = torch.arccos(torch.arange(length, device=like.device, dtype=torch.float64) * (2 / last) - 1)
    E = (_dirichlet(psi[:, None] - phi, nodes) + _dirichlet(psi[:, None] + phi, nodes)) / (2 * nodes)
    return ((phi.cos() + 1) * ((length - 1) / 2)).to(like.dtype), E.to(like.dtype)


def _dirichlet(angle: Tensor, nodes: int) -> Tensor:
    """1 + 2 sum_{0 < m < nodes} cos(m angle)."""
    below = torch.sin(angle / 2)
    near = below.abs() < 1e-9
    ratio = torch.sin((nodes - 0.5) * angle) / below.masked_fill(near, 1.0)
    return ratio.masked_fill(near, 2.0 * nodes - 1)


class _Cosines(torch.autograd.Function):
    """M = F(q) E^T - E F(k)^T with F_in = sum_d cos(2 q_id h_n) - 1; the ones cancel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, x: Tensor, half: Tensor, E: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, x, half, E)
        with without_autocast(x.device):
            moments, state = E.mT @ x, x.new_zeros(x.shape[0], len(half), x.shape[2])
            y = torch.empty_like(x)
            for n, tokens in parts(x, q.shape[2] * len(half)):
                for t in tokens:
                    y[n, t] = _features(q[n, t], half) @ moments[n]
                    state[n].baddbmm_(_features(k[n, t], half).mT, x[n, t])
            return y - E @ state

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, x, half, E = ctx.saved_tensors
        moments, adjoint = E.mT @ x, E.mT @ grad  # (n, nodes, P)
        dq, dk, dx, state = torch.empty_like(q), torch.empty_like(k), torch.empty_like(x), torch.zeros_like(adjoint)
        for n, tokens in parts(x, q.shape[2] * len(half)):
            for t in tokens:
                state[n].baddbmm_(_features(q[n, t], half).mT, grad[n, t])
                dx[n, t] = _features(k[n, t], half) @ adjoint[n]
                dq[n, t] = -_slopes(q[n, t], half, grad[n, t] @ moments[n].mT)
                dk[n, t] = _slopes(k[n, t], half, x[n, t] @ adjoint[n].mT)
        return dq, dk, E @ state - dx, None, None


@fusible
def _features(q: Tensor, half: Tensor) -> Tensor:
    """sum_d cos(2 q_d h) - 1 (n, L, nodes), in a form that loses no digit of small angles."""
    return (q[..., None] * half).sin_().square_().sum(2).mul_(-2)


@fusible
def _slopes(q: Tensor, half: Tensor, grad: Tensor) -> Tensor:
    """sum_n grad_n 2 h_n sin(2 q_d h_n) (n, L, d)."""
    return torch.einsum("nldr,nlr->nld", (q[..., None] * (2 * half)).sin_(), grad * (2 * half))
