"""A linear map of what nobody else reads: its gradient takes its place in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import without_autocast


def last_linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u W^T + b (B, L, out), as F.linear, where the caller holds the only reference to u (B, L, in) and drops it.

    A backward pass that no second one can follow writes the gradient of u over u, and says so: see `is_spent`.
    """
    dtype = torch.get_autocast_dtype(u.device.type) if torch.is_autocast_enabled(u.device.type) else weight.dtype
    plain = type(u) is Tensor and type(weight) in (Tensor, torch.nn.Parameter)
    if not plain or u.dtype != dtype or not u.is_contiguous() or torch.compiler.is_compiling():
        return F.linear(u, weight, bias)
    y: Tensor = _Last.apply(u, weight, bias)
    return y


def is_spent(gradient: Tensor) -> bool:
    """Whether this gradient lies where `last_linear` put it, alone in its memory, which may be given back."""
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return whole and bool(getattr(gradient, "spent", False))


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(u.dtype)
        ctx.save_for_backward(u, weight)
        ctx.set_materialize_grads(False)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(u, cast, None if bias is None else bias.to(u.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if dy is None:
            return None, None, None
        u, weight = ctx.saved_tensors
        once = not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())
        with without_autocast(u.device):
            weight = weight.to(u.dtype)
            rows, values = dy.flatten(0, 1), u.flatten(0, 1)
            dweight = torch.mm(rows.t(), values).to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
            dbias = rows.sum(0).to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
            if not ctx.needs_input_grad[0]:
                return None, dweight, dbias
            if not (once and type(u) is Tensor):
                return (rows @ weight).view_as(u), dweight, dbias
            du = u.detach()
            torch.mm(rows, weight, out=du.view(-1, du.shape[-1]))
        torch.autograd.graph.increment_version(u)
        du.spent = True  # type: ignore[attr-defined]
        return du, dweight, dbias
