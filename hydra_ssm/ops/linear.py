"""Linear maps of 16-bit values by weights in float32, whose gradients are not rounded to 16 bits on their way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as fwAD
from torch.nn import functional as F

from .._autograd import without_autocast
from .backend import HAS_TRITON, transforming

WIDE = 4  # outputs for each input from which on cuBLAS is faster at the gradient of W^T (benchmarks/gpu/notes.md)


def first_linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u W^T + b, as F.linear; of a 16-bit product on a GPU a W in float32 has its gradient in all of its digits."""
    learns = weight.requires_grad and torch.is_grad_enabled()
    if not (u.is_cuda and learns and _plain(u, weight)) or transforming() or fwAD._current_level >= 0:
        return F.linear(u, weight, bias)
    dtype = _dtype(u, weight)
    if weight.dtype != torch.float32 or dtype == torch.float32 or u.dtype not in (torch.float32, dtype):
        return F.linear(u, weight, bias)
    y: Tensor = _Linear.apply(u.to(dtype), weight, bias, False)
    return y


def last_linear(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """u W^T + b (B, L, out), as F.linear, where the caller holds the only reference to u (B, L, in) and drops it.

    A backward pass that no second one can follow writes the gradient of u over u, and says so: see `is_spent`.
    """
    if not _plain(u, weight) or u.dtype != _dtype(u, weight) or not u.is_contiguous():
        return F.linear(u, weight, bias)
    y: Tensor = _Linear.apply(u, weight, bias, True)
    return y


def is_spent(gradient: Tensor) -> bool:
    """Whether this gradient lies where `last_linear` put it, alone in its memory, which may be given back."""
    whole = gradient.untyped_storage().nbytes() == gradient.nbytes
    return whole and bool(getattr(gradient, "spent", False))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of 16-bit matrices in float32 without rounding to what they are of."""
    if a.dtype.itemsize > 2:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _dtype(u: Tensor, weight: Tensor) -> torch.dtype:
    """Of the product."""
    kind = u.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _plain(u: Tensor, weight: Tensor) -> bool:
    return type(u) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _stands_for_many(dy: Tensor) -> bool:
    """Of torch.func, or of autograd's own is_grads_batched: such a tensor has no memory that kernels could write."""
    return transforming() or torch._C._functorch.is_legacy_batchedtensor(dy)


def _weight_gradient(dy: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T u (out, in) of dy (tokens, out) and u (tokens, in), in the dtype of the weight."""
    if torch.is_grad_enabled() or _stands_for_many(dy) or dtype != torch.float32 or u.dtype == torch.float32:
        return (dy.t() @ u).to(dtype)
    if not (u.is_cuda and HAS_TRITON) or dy.shape[1] < WIDE * u.shape[1]:
        return product(dy.t(), u)
    from .triton.library import where_it_lies
    from .triton.transpose import transposed

    turned: Tensor = where_it_lies(transposed, product(u.t(), dy))
    return turned


class _Linear(torch.autograd.Function):
    """over: where no second backward pass can follow, the gradient of u (B, L, in) is written over u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None, over: bool) -> Tensor:
        cast = weight.to(u.dtype)
        ctx.save_for_backward(u, weight, cast)
        ctx.set_materialize_grads(False)
        ctx.over, ctx.bias_dtype = over, None if bias is None else bias.dtype
        return F.linear(u, cast, None if bias is None else bias.to(u.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        u, weight, cast = ctx.saved_tensors
        kept = torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph()
        du = None
        with without_autocast(u.device):
            cast = weight.to(u.dtype) if torch.is_grad_enabled() else cast  # a second pass differentiates the first
            rows, values = (t.reshape(-1, t.shape[-1]) for t in (dy, u))
            dweight = _weight_gradient(rows, values, weight.dtype) if ctx.needs_input_grad[1] else None
            dbias = rows.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            if ctx.needs_input_grad[0] and (kept or not ctx.over or _stands_for_many(dy) or type(u) is not Tensor):
                du = dy @ cast
            elif ctx.needs_input_grad[0]:
                du = u.detach()
                torch.mm(rows, cast, out=du.view(values.shape))
                torch.autograd.graph.increment_version(u)
                du.spent = True  # type: ignore[attr-defined]
        return du, dweight, dbias, None
