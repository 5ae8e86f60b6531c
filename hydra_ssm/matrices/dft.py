"""DFT mixer: a fixed Fourier transform along the sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ._fft import short
from ._parts import AT_ONCE, cuts
from ._precision import at_least_float32
from .base import Inputs, StructuredMatrix


@dataclass(frozen=True)
class DFT(StructuredMatrix):
    """M_ij = cos(2 pi i j / max_length) / sqrt(max_length), nothing learned: FNet's.

    O(L log L); up to `SHORT` tokens, where L^2 is a constant, a product of matrices. Shorter sequences use the leading
    block, as if zeros followed.
    """

    data_dependent: ClassVar[bool] = False

    size: int
    like: Tensor  # (B, L, H, P)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        return cls(inputs.documents, inputs.settings.max_length, inputs.x)

    def sizes(self) -> tuple[int, int, int]:
        B, L, H, _ = self.like.shape
        return B, L, H

    def entries(self) -> Tensor:
        B, L, H = self.like.shape[:3]
        return self._cosines(L, self.like).expand(B, H, L, L)

    def multiply(self, x: Tensor) -> Tensor:
        if short(x.shape[1]):  # fewer numbers to move than transforms have, and tensor cores
            M = self._cosines(x.shape[1], x).expand(x.shape[0], -1, -1)  # for all heads alike
            return torch.bmm(M, x.flatten(2)).unflatten(2, x.shape[2:])
        place = torch.arange(x.shape[1], device=x.device)
        place = torch.minimum(place, self.size - place)  # the upper half mirrors the lower

        def transformed(x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(at_least_float32(x), n=self.size, dim=1, norm="ortho").real
            return spectrum[:, place].to(x.dtype)

        B, _, H, P = x.shape
        heads = cuts(H, AT_ONCE // (B * self.size * P))  # a transform takes several times the memory of its x
        return torch.cat([transformed(x[:, :, own]) for own in heads], dim=2)

    def _cosines(self, length: int, like: Tensor) -> Tensor:
        place = torch.arange(length, device=like.device)
        turns = (place[:, None] * place % self.size).to(at_least_float32(like).dtype) / self.size
        return (torch.cos(2 * math.pi * turns) * self.size**-0.5).to(like.dtype)
