"""How this project's closed-form gradients are declared."""

from __future__ import annotations

from collections.abc import Callable
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
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return exact
