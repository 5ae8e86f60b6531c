"""How this project's closed-form gradients are declared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def closed_form(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A static `backward` to a tuple that is no further differentiable, in the precision of what it is given.

    What it finds hangs on all that it is made of, so that differentiating it raises, whatever by. torch's own
    `once_differentiable` raises only where a gradient is wanted of everything.
    """
    exact = uncast(backward)

    @wraps(backward)
    def once(ctx: Any, grad: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler refuses second gradients itself
            with torch.no_grad():
                return exact(ctx, grad)
        given = _Given(ctx)
        with torch.no_grad():
            found = exact(given, grad)
        made_of = [t for t in (grad, *given.saved_tensors) if t is not None and t.requires_grad]
        if not made_of:
            return found
        gradients = [t for t in found if t is not None]
        tied = iter(_Once.apply(len(gradients), *gradients, *made_of))
        return tuple(None if t is None else next(tied) for t in found)

    return once


class _Given:
    """A context whose saved tensors are asked for once: checkpointing allows no more."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """Its first tensors, which hang on the others and cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the gradient of this product is a closed form that is differentiable once: use torch.func")


def uncast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A static `backward` in the precision of what it is given, differentiable as far as its operations are.

    Its products must not be cast where someone calls it under autocast: the forward pass has already chosen.
    """

    @wraps(backward)
    def exact(ctx: Any, grad: torch.Tensor) -> Any:
        with without_autocast(grad.device):
            return backward(ctx, grad)

    return exact


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, operations keep the dtypes that they are given."""
    kind = device.type  # torch's own context takes as long as a launch or two, and knows no meta device
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()
