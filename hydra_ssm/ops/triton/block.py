"""All of the Hydra layer between its projections, as kernels: what is projected goes in, what is normed comes out.

    projected = z | x | B_f C_f | B_b C_b | dt_f dt_b
    xBC, d = SiLU(conv(...)), W_D x + D      y = M x      normed = RMSNorm(y) * SiLU(z)

The backward pass writes the gradient of each part where it belongs in that of `projected`: nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import conv_backward, conv_forward
from .decay import Steps
from .library import differentiable_once, register
from .norm import norm_backward, norm_forward
from .plan import plan
from .product import Into, quasiseparable_backward, quasiseparable_forward


@dataclass(frozen=True)
class Sizes:
    """Heads H, their width P, groups G and state N."""

    heads: int
    headdim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.headdim

    @property
    def features(self) -> int:
        return self.groups * self.state

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, what passes the convolution, dt_f and dt_b: views."""
        widths = [self.inner, self.inner + 4 * self.features, self.heads, self.heads]
        z, wet, dt_f, dt_b = projected.split(widths, dim=-1)
        return z, wet, dt_f, dt_b

    def values_and_features(self, wet: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B, L, H, P), B_f, C_f, B_b and C_b (B, L, G, N): views."""
        x, *features = wet.split([self.inner] + [self.features] * 4, dim=-1)
        B_f, C_f, B_b, C_b = (t.unflatten(-1, (self.groups, self.state)) for t in features)
        return x.unflatten(-1, (self.heads, self.headdim)), B_f, C_f, B_b, C_b


@dataclass(frozen=True)
class Weights:
    """The layer's parameters between the projections, under their names there."""

    conv: Tensor  # (C, 1, width)
    conv_bias: Tensor | None  # (C,)
    dt_bias: Tensor  # (H,)
    A_log: Tensor  # (H,)
    D: Tensor  # (H,)
    fc_D: Tensor  # (H, inner)
    norm: Tensor  # (inner,)


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs of the forward pass, or finds again."""

    xBC: Tensor  # (B, L, C)
    diagonal: Tensor  # (B, L, H)
    y: Tensor  # (B, L, inner)
    rstd: Tensor  # (B, L)
    states: Tensor | None  # (2, B, chunks, H, N, P)


def block_forward(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], eps: float, ids: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, 2 inner + 4 G N + 2 H); keep: with the states of the backward's plan."""
    z, wet, dt_f, dt_b = sizes.parts(projected)
    xBC = conv_forward(wet, weights.conv, weights.conv_bias, ids, True)
    x, *features = sizes.values_and_features(xBC)
    dtype = x.dtype
    diagonal = F.linear(xBC[..., : sizes.inner], weights.fc_D.to(dtype), weights.D.to(dtype))
    steps = Steps(dt_f, dt_b, weights.A_log, weights.dt_bias, limits)
    how = plan(x, features[0], backward=keep)
    y, states = quasiseparable_forward(x, steps, *features, ids, diagonal, how)
    y = y.flatten(2)
    normed, rstd = norm_forward(y, z, weights.norm, eps)
    return normed, Kept(xBC, diagonal, y, rstd, states)


def block_backward(
    dnormed: Tensor, projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float],
    ids: Tensor | None, kept: Kept, reuse: bool,
) -> tuple[Tensor, Weights]:  # fmt: skip
    """The gradients of projected and of the weights; reuse: kept may be overwritten, and is."""
    z, wet, dt_f, dt_b = sizes.parts(projected)
    dprojected = torch.empty_like(projected)
    dz, dwet, ddt_f, ddt_b = sizes.parts(dprojected)
    dy = kept.y if reuse else torch.empty_like(kept.y)
    dnorm = norm_backward(dnormed, kept.y, z, weights.norm, kept.rstd, dy, dz)
    x, *features = sizes.values_and_features(kept.xBC)
    dxBC = torch.empty_like(kept.xBC)
    dx, *dfeatures = sizes.values_and_features(dxBC)
    steps = Steps(dt_f, dt_b, weights.A_log, weights.dt_bias, limits)
    _, _, _, dA_log, ddt_bias, *_, ddiagonal = quasiseparable_backward(
        dy.unflatten(-1, (sizes.heads, sizes.headdim)), x, steps, *features, ids, kept.diagonal, kept.states,
        plan(x, features[0], backward=True), Into(dx, ddt_f, ddt_b, *dfeatures),
    )  # fmt: skip
    assert ddiagonal is not None and ddt_bias is not None
    dd = ddiagonal.flatten(0, 1)
    dfc_D = dd.T @ kept.xBC.flatten(0, 1)[:, : sizes.inner]
    dxBC.flatten(0, 1)[:, : sizes.inner].addmm_(dd, weights.fc_D.to(dd.dtype))
    dconv, dconv_bias = conv_backward(dxBC, wet, weights.conv, weights.conv_bias, ids, True, dwet)
    dD = dd.sum(0, dtype=torch.float32).to(weights.D.dtype)
    return dprojected, Weights(dconv, dconv_bias, ddt_bias, dA_log, dD, dfc_D.to(weights.fc_D.dtype), dnorm)


INPUTS = (
    "Tensor projected, Tensor conv, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor fc_D, "
    "Tensor norm, Tensor? ids, int[] sizes, float low, float high, float eps"
)


def block(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], eps: float,
    ids: Tensor | None = None, *, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, 2 inner + 4 G N + 2 H) in its dtype, differentiable once.

    ids (B, L) number the documents, -1 is padding. recompute: the backward pass finds again what it needs of the
    forward pass, instead of keeping it.
    """
    values = [getattr(weights, f.name) for f in fields(weights)]
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (projected, *values))
    shape = [sizes.heads, sizes.headdim, sizes.groups, sizes.state]
    keep = needed and not recompute
    return torch.ops.hydra_ssm.block(projected, *values, ids, shape, *limits, eps, keep)[0]


def _forward(projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """normed, then what is kept, empty where nothing is."""
    *values, ids, shape, low, high, eps, keep = inputs
    normed, kept = block_forward(projected, Weights(*values), Sizes(*shape), (low, high), eps, ids, keep)
    if not keep:
        return normed, *(projected.new_empty(0) for _ in fields(Kept))
    states = projected.new_empty(0) if kept.states is None else kept.states
    return normed, kept.xBC, kept.diagonal, kept.y, kept.rstd, states


def _fake_forward(projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *_, shape, _, _, _, keep = inputs
    sizes = Sizes(*shape)
    batch, L, _ = projected.shape
    new = projected.new_empty
    normed = new(batch, L, sizes.inner)
    if not keep:
        return normed, *(new(0) for _ in fields(Kept))
    xBC = new(batch, L, sizes.inner + 4 * sizes.features)
    x, B, *_ = sizes.values_and_features(xBC)
    chunks = -(-L // plan(x, B, backward=True).chunk)
    states = new((2, batch, chunks, sizes.heads, sizes.state, sizes.headdim) if chunks > 1 else 0)
    rstd = new(batch, L, dtype=torch.float32)
    return normed, xBC, new(batch, L, sizes.heads), new(batch, L, sizes.inner), rstd, states


def _backward(dnormed: Tensor, projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The gradients of projected and of the weights in their order, empty for the one that is None."""
    found, grads = _gradients(dnormed, projected, *inputs, reuse=False)
    given = (getattr(grads, f.name) for f in fields(grads))
    return found, *(projected.new_empty(0) if g is None else g for g in given)


def _gradients(dnormed: Tensor, projected: Tensor, *inputs: Any, reuse: bool) -> tuple[Tensor, Weights]:
    *values, ids, shape, low, high, eps, xBC, diagonal, y, rstd, states = inputs
    weights, sizes, limits = Weights(*values), Sizes(*shape), (low, high)
    if xBC.numel():
        kept = Kept(xBC, diagonal, y, rstd, states if states.numel() else None)
    else:
        kept = block_forward(projected, weights, sizes, limits, eps, ids, True)[1]
    return block_backward(dnormed.contiguous(), projected, weights, sizes, limits, ids, kept, reuse)


def _fake_backward(dnormed: Tensor, projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    new = [projected.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:7]]
    return projected.new_empty(projected.shape), *new


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    *tensors, shape, low, high, eps, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as all that is kept would be written, to be thrown away
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options = shape, low, high, eps


def _differentiate(ctx: Any, dnormed: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:9], saved[9:]
    grads = torch.ops.hydra_ssm.block_backward(dnormed, *tensors, *ctx.options, *kept)
    return *(None if t is None else g for g, t in zip(grads, tensors[:8], strict=True)), *[None] * 6


register(
    "block", f"({INPUTS}, bool keep) -> ({', '.join(['Tensor'] * 6)})", _forward, _fake_forward, _differentiate, _save
)
register(
    "block_backward",
    f"(Tensor dnormed, {INPUTS}, Tensor xBC, Tensor diagonal, Tensor y, Tensor rstd, Tensor states) -> "
    f"({', '.join(['Tensor'] * 8)})",
    _backward, _fake_backward, differentiable_once,
)  # fmt: skip
