"""Dense mixer: every entry learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from .base import Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class Dense(StructuredMatrix):
    """M_ij = W_ij / sqrt(max_length), W learned: the token mixing of MLP-Mixer. O(L^2)."""

    data_dependent: ClassVar[bool] = False

    M: Tensor  # (H, L, L)
    batch: int

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Tensor]:
        return {"M": torch.randn(settings.nheads, settings.max_length, settings.max_length)}

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        batch, length = inputs.x.shape[:2]
        M = inputs.parameters["M"][:, :length, :length] * inputs.settings.max_length**-0.5
        return cls(inputs.documents, M.to(inputs.x.dtype), batch)

    def sizes(self) -> tuple[int, int, int]:
        return self.batch, self.M.shape[1], self.M.shape[0]

    def entries(self) -> Tensor:
        return self.M.expand(self.batch, *self.M.shape)

    def multiply(self, x: Tensor) -> Tensor:
        return torch.einsum("hij,bjhp->bihp", self.M, x)
