"""Where half precision does not do."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(t: Tensor) -> Tensor:
    """`t` in float32, or as wide as it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
