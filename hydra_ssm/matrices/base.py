"""What a class of structured matrices is: a value with `dense()` and `@`, and what it is built from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..ops.documents import Documents, Layout


@dataclass(frozen=True)
class Settings:
    """What a class may know of the block that it mixes for. Each class reads what it needs."""

    nheads: int
    headdim: int
    d_state: int  # order N of the class: state size, rank, features of a query and a key
    ngroups: int = 1
    max_length: int = 512  # of the fixed form; the data-dependent one only scales by it
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    A_init_range: tuple[float, float] = (1.0, 1.0)
    learnable_init_states: bool = False
    impl: str | None = None  # of the product, see `hydra_ssm.ops.semiseparable`, and all around it; None chooses
    recompute: bool = False  # fused kernels save memory in the forward pass and find again in the backward one
    tolerance: float | None = None  # relative, of products that are approximate; None: 1e-5, in float64 1e-13
    largest: float | None = None  # of vandermonde's features, where it is known; a product of larger ones is NaN


@dataclass(frozen=True)
class Feature:
    """Numbers that belong to one token: computed from it (data dependent) or learned by position (fixed)."""

    name: str
    shape: tuple[int, ...]
    conv: bool = True  # passes the short convolution
    activation: bool = False  # then SiLU
    learned: bool = True  # has a table in the fixed form; where not, it is zero there

    @property
    def size(self) -> int:
        """Channels of in_proj that it takes."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inputs:
    """What a matrix is built from."""

    x: Tensor  # (B, L, H, P) values that it will mix
    features: Mapping[str, Tensor]  # (B, L, *shape) each; in the fixed form all rows of the batch are alike
    parameters: Mapping[str, Tensor]
    settings: Settings
    documents: Documents | None


@dataclass(frozen=True)
class Projected:
    """What a block has after its input projection, and all that it uses before its output projection."""

    projected: Tensor  # (B, L, z | x and the features that pass the convolution | the other features)
    conv_weight: Tensor  # (C, 1, width)
    conv_bias: Tensor | None  # (C,)
    norm_weight: Tensor  # (d_inner,)
    norm_eps: float
    parameters: Mapping[str, Tensor]
    settings: Settings
    documents: Documents | None
    private: bool  # nobody else has seen `projected`


@dataclass(frozen=True)
class StructuredMatrix(ABC):
    """M (B, H, L, L), one matrix a head, never stored: `M @ x` is its fast product, `M.dense()` its entries.

    A subclass holds tensors, gives `entries` and `multiply` without regard to padding, and declares what it is built
    from. Rows and columns of padding are zero.
    """

    documents: Documents | None

    data_dependent: ClassVar[bool] = True  # has a form whose tokens compute their own features
    fixed: ClassVar[bool] = True  # has a form whose features are learned by position, up to a maximum length
    packs: ClassVar[bool] = False  # takes many documents in one row; other classes get a row for each document
    skip: ClassVar[bool] = True  # the block adds the identity, as the class has no diagonal of its own
    ways: ClassVar[tuple[str, ...]] = ()  # how factors read x, where their products are multiplied and no matrix is

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        """What each token brings, besides its values x (B, L, H, P)."""
        return ()

    @classmethod
    def parameters(cls, settings: Settings) -> dict[str, Tensor]:
        """Learned parameters that belong to no token, initialised."""
        return {}

    @classmethod
    @abstractmethod
    def build(cls, inputs: Inputs) -> Self:
        """The matrix of these features and parameters."""

    @classmethod
    def fused(cls, block: Projected) -> Tensor | None:
        """All of the block between its projections (B, L, d_inner) as one operation, where there is a kernel for it."""
        return None

    @abstractmethod
    def entries(self) -> Tensor:
        """All entries (B, H, L, L); what stands at padding does not matter."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The product (B, L, H, P); x is zero at padding, what comes out there does not matter."""

    def dense(self) -> Tensor:
        """The matrix itself (B, H, L, L): the oracle, O(L^2) memory, differentiable."""
        M = self.entries()
        if self.documents is None:
            return M
        valid = self.documents.valid
        return M.masked_fill(~(valid[:, None, :, None] & valid[:, None, None, :]), 0.0)

    def sizes(self) -> tuple[int, int, int] | None:
        """(B, L, H) of what it multiplies; None where the class refuses others itself."""
        return None

    def factor(self, way: str) -> StructuredMatrix:
        """One of the matrices whose products with x are multiplied, of a class that has none of its own."""
        raise TypeError(f"{type(self).__name__} is a matrix, and has no factor {way}")

    def __matmul__(self, x: Tensor) -> Tensor:
        """y_i = sum_j M_ij x_j for x (B, L, H, P), at the cost of the class. Raises ValueError for other sizes."""
        sizes = self.sizes()
        if sizes is not None and (x.ndim != 4 or x.shape[:3] != torch.Size(sizes)):
            raise ValueError(f"x must be (batch, length, heads, P), here {(*sizes, 'P')}, got {tuple(x.shape)}")
        if self.documents is None:
            return self.multiply(x)
        return self.documents.zero_padding(self.multiply(self.documents.zero_padding(x)))


@dataclass(frozen=True)
class Placed(StructuredMatrix):
    """Matrices on inner grids of tokens, seen from the outer one of their layouts: block diagonal over documents."""

    matrices: tuple[StructuredMatrix, ...]
    layouts: tuple[Layout, ...]

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        raise TypeError("Placed is made from matrices and layouts")

    def entries(self) -> Tensor:
        """The inner entries where both tokens came from one row of an inner grid, zero elsewhere."""
        return reduce(torch.add, map(_place, self.matrices, self.layouts))

    def factor(self, way: str) -> StructuredMatrix:
        """That of the inner matrices, seen from the outer grid."""
        return Placed(None, tuple(matrix.factor(way) for matrix in self.matrices), self.layouts)

    def multiply(self, x: Tensor) -> Tensor:
        """Take, multiply, restore."""
        pairs = zip(self.matrices, self.layouts, strict=True)
        return reduce(torch.add, [layout.restore(matrix @ layout.take(x)) for matrix, layout in pairs])


def _place(matrix: StructuredMatrix, layout: Layout) -> Tensor:
    M = matrix.dense()
    if layout.target is None:
        return M
    width = M.shape[-1]
    row, place = layout.target // width, layout.target % width  # (B, L) each
    heads = torch.arange(M.shape[1], device=M.device)[:, None, None]
    picked = M[row[:, None, :, None], heads, place[:, None, :, None], place[:, None, None, :]]
    apart = row[:, :, None] != row[:, None, :]
    if layout.valid is not None:
        apart = apart | ~(layout.valid[:, :, None] & layout.valid[:, None, :])
    return picked.masked_fill(apart[:, None], 0.0)
