"""Vandermonde mixer: cosines of a token's frequency at the other's position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import Parameter

from ..ops.backend import transforming
from ._cosines import cosines, rank
from ._nonuniform import any_cosines
from ._precision import at_least_float32, tolerance
from ._terms import sum_over_features
from .base import Feature, Inputs, Settings, StructuredMatrix

FREQUENCY = 1e-3  # turns a token, for a feature of 1 (the paper's)
MOST_NODES = 192  # of the interpolation; beyond, a non-uniform FFT is faster


@dataclass(frozen=True)
class Vandermonde(StructuredMatrix):
    """M_ij = sum_d (cos(2 pi e q_id j) - cos(2 pi e k_jd i)) / sqrt(2 max_length d), e = 1e-3. O(L log L).

    The product is exact to a tolerance. While angles stay small, up to 320 or so at the last token, a few nodes in time
    interpolate all cosines; their number follows from the largest of q and k, which a GPU's host waits for. Larger
    angles take a non-uniform FFT, and so do all where nothing can be waited for, see `_static`. Where
    `largest` is known, the first way is the same operations for all values, as CUDA graphs of short sequences ask for,
    and a product of larger features is NaN.
    """

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)
    scale: float
    tolerance: float | None = None
    largest: float | None = None  # of |q| and |k|, where somebody knows it

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape), Feature("k", shape)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        scale = (2 * inputs.settings.max_length * inputs.settings.d_state) ** -0.5
        q, k, settings = inputs.features["q"], inputs.features["k"], inputs.settings
        return cls(inputs.documents, q, k, scale, settings.tolerance, settings.largest)

    def sizes(self) -> tuple[int, int, int]:
        B, L, H, _ = self.q.shape
        return B, L, H

    def entries(self) -> Tensor:
        wide = torch.promote_types(self.q.dtype, torch.float32)  # angles grow with the position
        place = torch.arange(self.q.shape[1], device=self.q.device, dtype=wide) * (2 * math.pi * FREQUENCY)

        def term(q: Tensor, k: Tensor) -> Tensor:
            return torch.cos(q * place) - torch.cos(k * place[:, None])

        return (sum_over_features(term, self.q.to(wide), self.k.to(wide)) * self.scale).to(self.q.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        if transforming():  # which takes no gradient in a closed form
            return torch.einsum("bhij,bjhp->bihp", self.entries(), x)
        q, k, wide = (rearrange(at_least_float32(t), "b l h d -> (b h) l d") for t in (self.q, self.k, x))
        allowed, largest = tolerance(self.tolerance, x.dtype), self.largest
        if largest is None and not _static(x):
            largest = float(self._largest())
        angle = math.inf if largest is None else math.pi * FREQUENCY * largest * (x.shape[1] - 1)
        # As many nodes as radians are too few: what a diverged model asks for is not even counted.
        nodes = rank(angle, allowed) if angle < MOST_NODES else None
        if nodes is None or nodes > MOST_NODES:
            y = any_cosines(q, k, wide, FREQUENCY, allowed)
        else:
            y = cosines(q, k, wide, 2 * math.pi * FREQUENCY, nodes)
        if self.largest is not None:
            y = y.masked_fill(self._largest() > self.largest, torch.nan)
        return rearrange((y * self.scale).to(x.dtype), "(b h) l p -> b l h p", h=x.shape[2])

    def _largest(self) -> Tensor:
        """max |q|, |k|; to read it, the host of a GPU waits."""
        return torch.stack([t.detach().abs().nan_to_num(0.0, 0.0).amax() for t in (self.q, self.k)]).max()


def _static(x: Tensor) -> bool:
    """Whether the operations must be the same for all values: while torch compiles them or captures a CUDA graph.

    Graphs are captured on another stream than the default one, and run there before, so that libraries are prepared.
    """
    traced = torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter)  # torch 2.11 does not say so of M @ x
    if traced or x.is_meta:
        return True
    return x.is_cuda and torch.cuda.current_stream(x.device) != torch.cuda.default_stream(x.device)
