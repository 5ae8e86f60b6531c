"""What a number, such as the time step of a diffusion, is to a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimeStep(nn.Module):
    """Numbers (B,) to conditions (B, d_condition): waves of lengths up to 2 pi `longest`, and two linear layers.

    For classes nn.Embedding(classes, d_condition) does the same; conditions may be added up.
    """

    def __init__(self, d_condition: int, waves: int = 64, longest: float = 10_000.0) -> None:
        super().__init__()
        self.waves, self.longest = waves, longest
        self.inner, self.outer = nn.Linear(2 * waves, d_condition), nn.Linear(d_condition, d_condition)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) integers or numbers to (B, d_condition)."""
        exponent = torch.arange(self.waves, device=t.device) / max(1, self.waves - 1)
        angle = t[:, None].float() * torch.exp(-math.log(self.longest) * exponent)  # float32: half rounds angles away
        found = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(found)))
