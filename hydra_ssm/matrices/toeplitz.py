"""Toeplitz mixer: a convolution as long as the sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from ._fft import fast_length, short
from ._precision import at_least_float32
from .base import Feature, Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class Toeplitz(StructuredMatrix):
    """M_ij = t_{i-j} / (2 sqrt(max_length)); token k brings t_k and t_{-k}, token 0 its t_0 alone.

    O(L log L); up to `SHORT` tokens, where L^2 is a constant, a product of matrices.
    """

    t_causal: Tensor  # (B, L, H) t_0, t_1, ...
    t_anticausal: Tensor  # (B, L, H) not used, t_{-1}, ...
    scale: float

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        return Feature("t_causal", (settings.nheads,)), Feature("t_anticausal", (settings.nheads,))

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        t = inputs.features["t_causal"], inputs.features["t_anticausal"]
        return cls(inputs.documents, *t, 0.5 * inputs.settings.max_length**-0.5)

    def sizes(self) -> tuple[int, int, int]:
        B, L, H = self.t_causal.shape
        return B, L, H

    def entries(self) -> Tensor:
        # From t_{1-L} at 0 to t_{L-1} at 2L - 2.
        t = torch.cat([self.t_anticausal[:, 1:].flip(1), self.t_causal], dim=1)
        place = torch.arange(self.t_causal.shape[1], device=t.device)
        entries = t[:, place[:, None] - place + len(place) - 1] * self.scale
        return rearrange(entries, "b i j h -> b h i j")

    def multiply(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        if short(L):
            return self._multiply_short(x)
        n = fast_length(2 * L - 1)
        gap = x.new_zeros(self.t_causal.shape[0], n - 2 * L + 1, self.t_causal.shape[2])
        t = torch.cat([self.t_causal, gap, self.t_anticausal[:, 1:].flip(1)], dim=1) * self.scale
        # In float32 at least: transforms of half precision exist for few lengths and devices, and lose too much.
        spectrum = torch.fft.rfft(at_least_float32(t), dim=1)[..., None]
        y = torch.fft.irfft(spectrum * torch.fft.rfft(at_least_float32(x), n=n, dim=1), n=n, dim=1)
        return y[:, :L].to(x.dtype)

    def _multiply_short(self, x: Tensor) -> Tensor:
        """By the entries, in the dtype of x: fewer numbers to move than transforms have, and tensor cores."""
        t = self.t_causal, self.t_anticausal
        if all(part.stride(0) == 0 for part in t):  # expanded by the fixed form, which has one matrix for the batch
            return torch.einsum("hij,bjhp->bihp", self._skewed(t[0][:1], t[1][:1], x.dtype)[0], x)
        return torch.einsum("bhij,bjhp->bihp", self._skewed(*t, x.dtype), x)

    def _skewed(self, t_causal: Tensor, t_anticausal: Tensor, dtype: torch.dtype) -> Tensor:
        """The entries without indices, whose gradient would be added up one by one and in any order.

        Equal rows t_0, t_{-1}, ..., 0, 0, ..., t_2, t_1, read on as rows that are one shorter: each begins one earlier.
        """
        causal, anticausal = (rearrange(t, "b l h -> b h l") for t in (t_causal, t_anticausal))
        L = causal.shape[-1]
        gap = causal.new_zeros(*causal.shape[:2], 2)  # new rows of 2 L, whose places in memory suit tensor cores
        row = torch.cat([causal[..., :1], anticausal[..., 1:], gap, causal[..., 1:].flip(-1)], dim=-1)
        row = (row * self.scale).to(dtype)[..., None, :]
        equal = row.expand(*row.shape[:2], L, -1).reshape(*row.shape[:2], -1)
        return equal[..., : L * 2 * L].unflatten(-1, (L, 2 * L))[..., :L]
