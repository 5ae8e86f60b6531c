"""Semiseparable mixers: state space models that read one way, or both ways by the usual recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Triangle, semiseparable
from ..ops.reference import entries
from ._precision import at_least_float32
from .base import Feature, Inputs, Settings, StructuredMatrix


@dataclass(frozen=True)
class Triangles(StructuredMatrix):
    """M = sum of semiseparable triangles, plus a free diagonal where the class has one. O(L).

    With learned initial states the product is affine: M @ x = dense() x + M @ 0.
    """

    packs: ClassVar[bool] = True
    skip: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ("causal", "anticausal")
    strict: ClassVar[bool] = False  # shifted: row i reads what its neighbour has read
    free_diagonal: ClassVar[bool] = False  # D_h + <W_D[h], x_i>
    shared: ClassVar[bool] = False  # one B and one C for both directions

    triangles: tuple[Triangle, ...]
    diagonal: Tensor | None  # (B, L, H)
    impl: str | None = None

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.ngroups, settings.d_state)
        return (
            *(Feature(n + end, shape, activation=True) for end in cls._endings() for n in ("B", "C")),
            *(Feature(f"dt_{d}", (settings.nheads,), conv=False, learned=False) for d in cls.directions),
        )

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Tensor]:
        H, P, N = settings.nheads, settings.headdim, settings.d_state
        for name in ("A_init_range", "dt_limit"):
            if len(tuple(getattr(settings, name))) != 2:
                raise ValueError(f"{name} must be two numbers, got {getattr(settings, name)}")
        low, high = settings.A_init_range
        if not 0 < low <= high:
            raise ValueError(f"A_init_range must be two rising numbers above 0, got {settings.A_init_range}")
        if not 0 <= settings.dt_limit[0] < settings.dt_limit[1]:
            raise ValueError(f"dt_limit must be two rising numbers, the first at least 0, got {settings.dt_limit}")
        if not 0 < settings.dt_min <= settings.dt_max:
            raise ValueError(f"dt_min must be above 0 and at most dt_max = {settings.dt_max}, got {settings.dt_min}")
        found = {"dt_bias": _dt_bias(settings), "A_log": torch.empty(H).uniform_(low, high).log()}
        if cls.free_diagonal:
            inner = H * P
            found["D"] = torch.ones(H)
            found["fc_D.weight"] = torch.empty(H, inner).uniform_(-(inner**-0.5), inner**-0.5)
        if settings.learnable_init_states:
            found["init_states"] = torch.zeros(H, P, N)
        return found

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        diagonal = None
        if cls.free_diagonal:
            weight = inputs.parameters["fc_D.weight"]
            diagonal = F.linear(inputs.x.flatten(2), weight.to(inputs.x.dtype)) + inputs.parameters["D"]
        endings = cls._endings() * (2 if cls.shared else 1)
        triangles = tuple(cls._triangle(inputs, d, e) for d, e in zip(cls.directions, endings, strict=True))
        return cls(inputs.documents, triangles, diagonal, inputs.settings.impl)

    @classmethod
    def _endings(cls) -> tuple[str, ...]:
        """What the names of B and C end with, for each pair of them."""
        return ("",) if cls.shared else tuple(f"_{d}" for d in cls.directions)

    @classmethod
    def _triangle(cls, inputs: Inputs, direction: str, ending: str) -> Triangle:
        parameters = inputs.parameters
        raw = at_least_float32(inputs.features[f"dt_{direction}"])  # exponents: half precision moves them by percents
        dt = F.softplus(raw + parameters["dt_bias"]).clamp(*inputs.settings.dt_limit)
        if inputs.documents is not None:
            dt = inputs.documents.zero_padding(dt)
        B, C = inputs.features["B" + ending], inputs.features["C" + ending]
        A = -at_least_float32(parameters["A_log"]).exp()
        return Triangle(dt, A, B, C, direction == "anticausal", cls.strict, parameters.get("init_states"))

    def entries(self) -> Tensor:
        ids = None if self.documents is None else self.documents.ids
        M = reduce(torch.add, [entries(t, ids) for t in self.triangles])
        return M if self.diagonal is None else M + torch.diag_embed(self.diagonal.mT)

    def multiply(self, x: Tensor) -> Tensor:
        return semiseparable(x, self.triangles, self.documents, diagonal=self.diagonal, impl=self.impl)


class Semiseparable(Triangles):
    """M_ij = dt_j (C_i . B_j) exp(sum of a over j < k <= i) for i >= j: Mamba-2's SSD, one direction. O(L)."""

    directions = ("causal",)


class Add(Triangles):
    """Two scans summed: both triangles hold the diagonal, which neither can choose freely. O(L)."""


class AddDiagonal(Triangles):
    """Two scans summed, and a free diagonal (a row of the paper's Table 10). O(L)."""

    free_diagonal = True


class AddShift(Triangles):
    """Two shifted scans summed: an empty diagonal (a row of the paper's Table 10). O(L)."""

    strict = True


@dataclass(frozen=True)
class Concat(Triangles):
    """The first half of the heads reads left to right, the second right to left. O(L)."""

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        if settings.nheads % 2 or (settings.nheads // 2) % settings.ngroups:
            raise ValueError(f"concat needs an even number of heads whose half ngroups divides, got {settings.nheads}")
        *rest, dt, _ = super().features(settings)
        half = Feature(dt.name, (settings.nheads // 2,), conv=False, learned=False)
        return (*rest, half, Feature("dt_anticausal", half.shape, conv=False, learned=False))

    @classmethod
    def _triangle(cls, inputs: Inputs, direction: str, ending: str) -> Triangle:
        middle = inputs.settings.nheads // 2
        half = slice(None, middle) if direction == "causal" else slice(middle, None)
        own = {name: value[half] for name, value in inputs.parameters.items()}
        return super()._triangle(replace(inputs, parameters=own), direction, ending)

    def entries(self) -> Tensor:
        ids = None if self.documents is None else self.documents.ids
        return torch.cat([entries(t, ids) for t in self.triangles], dim=1)

    def multiply(self, x: Tensor) -> Tensor:
        halves = zip(x.chunk(2, dim=2), self.triangles, strict=True)
        return torch.cat([semiseparable(half, [t], self.documents, impl=self.impl) for half, t in halves], dim=2)


class Mult(Triangles):
    """Two scans multiplied, elementwise: quadratic in x, so no matrix on its own. O(L)."""

    ways = ("→", "←")

    def entries(self) -> Tensor:
        raise TypeError("mult is quadratic in x and has no matrix: look at its triangles, one by one")

    def factor(self, way: str) -> StructuredMatrix:
        """One of the triangles as the matrix that it is."""
        return Add(self.documents, (self.triangles[self.ways.index(way)],), None, self.impl)

    def multiply(self, x: Tensor) -> Tensor:
        return reduce(torch.mul, [semiseparable(x, [t], self.documents, impl=self.impl) for t in self.triangles])


def _dt_bias(settings: Settings) -> Tensor:
    """The inverse softplus of log-uniform step sizes."""
    low, high = math.log(settings.dt_min), math.log(settings.dt_max)
    dt = torch.empty(settings.nheads).uniform_(low, high).exp().clamp(min=settings.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))
