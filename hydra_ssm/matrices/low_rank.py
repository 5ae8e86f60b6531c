"""Low-rank mixer: linear attention without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .base import Feature, Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class LowRank(StructuredMatrix):
    """M_ij = q_i . k_j / sqrt(max_length d), with SiLU on q and k in the data-dependent form. O(L)."""

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)
    scale: float

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape, activation=True), Feature("k", shape, activation=True)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        scale = (inputs.settings.max_length * inputs.settings.d_state) ** -0.5
        return cls(inputs.documents, inputs.features["q"], inputs.features["k"], scale)

    def sizes(self) -> tuple[int, int, int]:
        B, L, H, _ = self.q.shape
        return B, L, H

    def entries(self) -> Tensor:
        return torch.einsum("bihd,bjhd->bhij", self.q, self.k) * self.scale

    def multiply(self, x: Tensor) -> Tensor:
        state = torch.einsum("bjhd,bjhp->bhdp", self.k * self.scale, x)  # scaled first: the sum fits into fp16
        return torch.einsum("bihd,bhdp->bihp", self.q, state)
