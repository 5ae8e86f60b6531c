"""Structured matrices: one file a class, and the names they go by."""

from .attention import Attention
from .base import Feature, Inputs, Placed, Projected, Settings, StructuredMatrix
from .butterfly import Monarch
from .cauchy import Cauchy
from .dense import Dense
from .dft import DFT
from .low_rank import LowRank
from .quasiseparable import Quasiseparable, SharedQuasiseparable
from .semiseparable import Add, AddDiagonal, AddShift, Concat, Mult, Semiseparable
from .toeplitz import Toeplitz
from .vandermonde import Vandermonde

MATRICES: dict[str, type[StructuredMatrix]] = {
    "dense": Dense,
    "attention": Attention,
    "low_rank": LowRank,
    "butterfly": Monarch,
    "toeplitz": Toeplitz,
    "dft": DFT,
    "vandermonde": Vandermonde,
    "cauchy": Cauchy,
    "semiseparable": Semiseparable,
    "quasiseparable": Quasiseparable,
    "quasiseparable_shared": SharedQuasiseparable,
    "add": Add,
    "add_diagonal": AddDiagonal,
    "add_shift": AddShift,
    "mult": Mult,
    "concat": Concat,
}

__all__ = ["MATRICES", "Feature", "Inputs", "Placed", "Projected", "Settings", "StructuredMatrix"]
__all__ += [matrix.__name__ for matrix in MATRICES.values()]
