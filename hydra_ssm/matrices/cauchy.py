"""Cauchy mixer: reciprocals of sums of positive features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from ..ops.backend import transforming
from ._exponential_sum import exponential_sum
from ._precision import at_least_float32, tolerance
from ._reciprocal import exponents_and_weights
from ._terms import sum_over_features
from .base import Feature, Inputs, Settings, StructuredMatrix

FLOOR = 1e-8  # keeps the denominator from zero
LARGEST = 80.0


@dataclass(frozen=True)
class Cauchy(StructuredMatrix):
    """M_ij = sum_d 1 / (exp q_id + exp k_jd + 2c) / sqrt(max_length d), c learned. O(L), to a tolerance.

    Each denominator D must be positive. 1 / D is a sum of exponentials exp(-s D) to within the tolerance, the terms s
    and their weights scaled by the least D of a sequence, head and d; where D is 1e7 times the least, its reciprocal
    is off by up to 1e-7 of the largest. exp(-s D) is a product of a factor of i and one of j: linear attention.
    """

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)
    c: Tensor  # ()
    scale: float
    tolerance: float | None = None

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
        q, k, c = inputs.features["q"], inputs.features["k"], inputs.parameters["c"]
        return cls(inputs.documents, q, k, c, scale, inputs.settings.tolerance)

    def sizes(self) -> tuple[int, int, int]:
        B, L, H, _ = self.q.shape
        return B, L, H

    def entries(self) -> Tensor:
        q, k, c = self._nodes()

        def term(q: Tensor, k: Tensor) -> Tensor:
            return 1 / (q + k + FLOOR)

        return (sum_over_features(term, q + c, k + c) * self.scale).to(self.q.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        if transforming():  # which takes no gradient in a closed form
            return torch.einsum("bhij,bjhp->bihp", self.entries(), x)
        q, k, c = self._nodes()
        (q, least_q), (k, least_k) = (self._above_least(t) for t in (q, k))
        D = (least_q + least_k + 2 * c + FLOOR).detach()  # (B, H, d, 1), the least denominators
        D = torch.where(D > 0, D, torch.nan)  # a pole inside the matrix gives NaN
        s, w = exponents_and_weights(tolerance(self.tolerance, x.dtype), D)
        scale = ((w * self.scale / D).log() - s) / 2
        rise = c - c.detach()  # zero, for the gradient
        q, k, scale = (t.flatten(0, 1) for t in ((q + rise) / D, (k + rise) / D, scale))
        values = x.float() if x.dtype == torch.float16 else x  # sums over tokens may leave the range of float16
        y = exponential_sum(q, k, scale, s, rearrange(values, "b l h p -> (b h) l p"))
        return rearrange(y.to(x.dtype), "(b h) l p -> b l h p", h=x.shape[2])

    def _nodes(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp q, exp k and c in float32 at least.

        Clamped where an entry is zero to all digits: beyond, exp overflows and its gradient would be infinity * 0.
        """
        q, k = (at_least_float32(t).clamp(max=LARGEST).exp() for t in (self.q, self.k))
        return q, k, self.c.to(q.dtype)

    def _above_least(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B, L, H, d) less its least over the tokens, (B, H, d, L), and that, (B, H, d, 1), a constant."""
        t = rearrange(t, "b l h d -> b h d l")
        tokens = t.detach()
        if self.documents is not None:
            tokens = tokens.masked_fill(~self.documents.valid[:, None, None], torch.inf)
        least = tokens.amin(-1, keepdim=True).clamp(max=math.exp(LARGEST))
        return (t - least).clamp(min=0), least  # what is below it is padding
