"""Linear maps of 16-bit values by weights in float32, whose gradients are not rounded to 16 bits on their way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import without_autocast
from .backend import transforming

WIDE = 4  # outputs for each input, from which on cuBLAS is faster if it finds the gradient transposed: see the notes


def first_linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u W^T + b, as F.linear; where u is rounded to 16 bits on a GPU and W is not, its gradient is not either."""
    learns = weight.requires_grad and torch.is_grad_enabled()
    if not (u.is_cuda and learns and _plain(u, weight)) or transforming():
        return F.linear(u, weight, bias)
    dtype = _dtype(u, weight)
    if weight.dtype != torch.float32 or dtype == torch.float32:
        return F.linear(u, weight, bias)
    y: Tensor = _Linear.apply(u.to(dtype), weight, bias)
    return y


def last_linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u W^T + b (B, L, out), as F.linear, where the caller holds the only reference to u (B, L, in) and drops it.

    A backward pass that no second one can follow writes the gradient of u over u, and says so: see `is_spent`.
    """
    if not _plain(u, weight) or u.dtype != _dtype(u, weight) or not u.is_contiguous():
        return F.linear(u, weight, bias)
    y: Tensor = _Last.apply(u, weight, bias)
    return y


def is_spent(gradient: Tensor) -> bool:
    """Whether this gradient lies where `last_linear` put it, alone in its memory, which may be given back."""
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return whole and bool(getattr(gradient, "spent", False))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, without rounding to what a and b are of."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _dtype(u: Tensor, weight: Tensor) -> torch.dtype:
    """Of the product."""
    kind = u.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _plain(u: Tensor, weight: Tensor) -> bool:
    return type(u) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _weight_gradient(dy: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T u (out, in) of dy (tokens, out) and u (tokens, in), in the dtype of the weight."""
    if torch.is_grad_enabled() or dtype != torch.float32 or u.dtype == torch.float32:
        return (dy.t() @ u).to(dtype)
    if not u.is_cuda or dy.shape[1] < WIDE * u.shape[1]:
        return product(dy.t(), u)
    from .triton.transpose import transposed

    return transposed(product(u.t(), dy))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(u.dtype)
        ctx.save_for_backward(u, weight, cast)
        ctx.set_materialize_grads(False)
        ctx.bias = None if bias is None else bias.dtype
        return F.linear(u, cast, None if bias is None else bias.to(u.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if dy is None:
            return None, None, None
        u, weight, cast = ctx.saved_tensors
        with without_autocast(u.device):
            cast = weight.to(u.dtype) if torch.is_grad_enabled() else cast  # a second pass differentiates the first
            du = dy @ cast if ctx.needs_input_grad[0] else None
            rows, values = dy.flatten(0, -2), u.flatten(0, -2)
            dweight = _weight_gradient(rows, values, weight.dtype) if ctx.needs_input_grad[1] else None
            dbias = rows.sum(0, dtype=ctx.bias) if ctx.needs_input_grad[2] else None
        return du, dweight, dbias


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(u.dtype)
        ctx.save_for_backward(u, weight, cast)
        ctx.set_materialize_grads(False)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return F.linear(u, cast, None if bias is None else bias.to(u.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if dy is None:
            return None, None, None
        u, weight, cast = ctx.saved_tensors
        once = not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())
        with without_autocast(u.device):
            weight = weight.to(u.dtype) if torch.is_grad_enabled() else cast
            rows, values = dy.flatten(0, 1), u.flatten(0, 1)
            dweight = _weight_gradient(rows, values, ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
            dbias = rows.sum(0, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
            if not ctx.needs_input_grad[0]:
                return None, dweight, dbias
            if not (once and type(u) is Tensor):
                return (rows @ weight).view_as(u), dweight, dbias
            du = u.detach()
            torch.mm(rows, weight, out=du.view(-1, du.shape[-1]))
        torch.autograd.graph.increment_version(u)
        du.spent = True  # type: ignore[attr-defined]
        return du, dweight, dbias
