"""Butterfly mixer: a Monarch product of two block-diagonal factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class Monarch(StructuredMatrix):
    """M[(a, b), (c, d)] = left[b, a, c] right[c, b, d], token i = (i // m, i % m), m = ceil(sqrt(max_length)).

    Right mixes within each block of m tokens, left the tokens with one place in their blocks. O(L m). Lengths that
    are no square use the leading block, as if zeros followed.
    """

    data_dependent: ClassVar[bool] = False

    left: Tensor  # (H, m, m, m) place, block out, block in
    right: Tensor  # (H, m, m, m) block, place out, place in
    shape: tuple[int, int]  # B, L

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Tensor]:
        m = _blocks(settings.max_length)
        return {name: torch.randn(settings.nheads, m, m, m) * m**-0.5 for name in ("left", "right")}

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        B, L = inputs.x.shape[:2]
        left, right = (inputs.parameters[name].to(inputs.x.dtype) for name in ("left", "right"))
        return cls(inputs.documents, left, right, (B, L))

    def sizes(self) -> tuple[int, int, int]:
        return *self.shape, self.left.shape[0]

    def entries(self) -> Tensor:
        B, L = self.shape
        M = torch.einsum("hbac,hcbd->habcd", self.left, self.right).flatten(3, 4).flatten(1, 2)
        return M[:, :L, :L].expand(B, -1, L, L)

    def multiply(self, x: Tensor) -> Tensor:
        m, L = self.left.shape[1], x.shape[1]
        blocks = -(-L // m)  # the others hold zeros, and nobody reads them
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * m - L)).unflatten(1, (blocks, m))
        mixed = torch.einsum("hcbd,Bcdhp->Bcbhp", self.right[:, :blocks], padded)
        return torch.einsum("hbac,Bcbhp->Babhp", self.left[:, :, :blocks, :blocks], mixed).flatten(1, 2)[:, :L]


def _blocks(length: int) -> int:
    return math.isqrt(length - 1) + 1
