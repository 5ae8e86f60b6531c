"""How this project's closed-form gradients are declared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def closed_form(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A static `backward` that is no further differentiable, in the precision of what it is given."""
    return once_differentiable(uncast(backward))


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
