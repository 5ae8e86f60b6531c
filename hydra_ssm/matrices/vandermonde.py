"""Vandermonde mixer: cosines of a token's frequency at the other's position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ._terms import sum_over_features
from .base import Feature, Inputs, Settings, StructuredMatrix

FREQUENCY = 1e-3  # turns a token, for a feature of 1 (the paper's)


@dataclass(frozen=True)
class Vandermonde(StructuredMatrix):
    """M_ij = sum_d (cos(2 pi e q_id j) - cos(2 pi e k_jd i)) / sqrt(2 max_length d), e = 1e-3.

    Quadratic as yet: the product goes through the entries.
    """

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)
    scale: float

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape), Feature("k", shape)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        scale = (2 * inputs.settings.max_length * inputs.settings.d_state) ** -0.5
        return cls(inputs.documents, inputs.features["q"], inputs.features["k"], scale)

    def entries(self) -> Tensor:
        wide = torch.promote_types(self.q.dtype, torch.float32)  # angles grow with the position
        place = torch.arange(self.q.shape[1], device=self.q.device, dtype=wide) * (2 * math.pi * FREQUENCY)

        def term(q: Tensor, k: Tensor) -> Tensor:
            return torch.cos(q * place) - torch.cos(k * place[:, None])

        return (sum_over_features(term, self.q.to(wide), self.k.to(wide)) * self.scale).to(self.q.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhp->bihp", self.entries(), x)
