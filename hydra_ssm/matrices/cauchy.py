"""Cauchy mixer: reciprocals of sums of positive features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ._terms import sum_over_features
from .base import Feature, Inputs, Settings, StructuredMatrix

FLOOR = 1e-8  # keeps the denominator from zero
LARGEST = 80.0


@dataclass(frozen=True)
class Cauchy(StructuredMatrix):
    """M_ij = sum_d 1 / (exp q_id + exp k_jd + 2c) / sqrt(max_length d), c learned.

    Quadratic as yet: the product goes through the entries.
    """

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)
    c: Tensor  # ()
    scale: float

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape), Feature("k", shape)

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Tensor]:
        return {"c": torch.tensor(0.5)}

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        scale = (inputs.settings.max_length * inputs.settings.d_state) ** -0.5
        return cls(inputs.documents, inputs.features["q"], inputs.features["k"], inputs.parameters["c"], scale)

    def entries(self) -> Tensor:
        wide = torch.promote_types(self.q.dtype, torch.float32)
        # Clamped where an entry is zero to all digits: beyond, exp overflows and its gradient would be infinity * 0.
        q, k, c = self.q.to(wide).clamp(max=LARGEST), self.k.to(wide).clamp(max=LARGEST), self.c.to(wide)

        def term(q: Tensor, k: Tensor) -> Tensor:
            return 1 / (q + k + FLOOR)

        return (sum_over_features(term, q.exp() + c, k.exp() + c) * self.scale).to(self.q.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhp->bihp", self.entries(), x)
