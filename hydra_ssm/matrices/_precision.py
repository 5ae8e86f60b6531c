"""Where half precision does not do."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as wide as it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def tolerance(given: float | None, dtype: torch.dtype) -> float:
    """Of a product that is not exact: what is given, or what hides among the roundings of most computations."""
    if given is not None:
        return given
    return 1e-13 if dtype == torch.float64 else 1e-5
