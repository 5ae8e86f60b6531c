"""Attention mixer: softmax of scaled scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .base import Feature, Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class Attention(StructuredMatrix):
    """M_ij = softmax_j(q_i . k_j / sqrt(d)): the Transformer's. O(L^2) time, O(L) memory through SDPA."""

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape), Feature("k", shape)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        return cls(inputs.documents, inputs.features["q"], inputs.features["k"])

    def entries(self) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", self.q, self.k) * self.q.shape[-1] ** -0.5
        keys = self._keys()
        return (scores if keys is None else scores.masked_fill(~keys, -torch.inf)).softmax(-1)

    def multiply(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b l h d -> b h l d") for t in (self.q, self.k, x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._keys())
        return rearrange(y, "b h l p -> b l h p")

    def _keys(self) -> Tensor | None:
        """(B, 1, 1, L) True for keys that may be read; the first stands in for none, its value being zero."""
        if self.documents is None:
            return None
        valid = self.documents.valid
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        return rearrange(valid | (first & ~valid.any(1, keepdim=True)), "b l -> b 1 1 l")
