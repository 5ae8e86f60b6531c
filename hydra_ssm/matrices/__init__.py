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


def matrix_class(matrix: str | type[StructuredMatrix]) -> type[StructuredMatrix]:
    """The class of this name, or the class itself. Raises ValueError or TypeError for anything else."""
    if isinstance(matrix, str):
        if matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {', '.join(MATRICES)}, got {matrix!r}")
        return MATRICES[matrix]
    if not (isinstance(matrix, type) and issubclass(matrix, StructuredMatrix)):
        raise TypeError(f"matrix must be a name in hydra_ssm.MATRICES or a class of StructuredMatrix, got {matrix!r}")
    return matrix


__all__ = ["MATRICES", "Feature", "Inputs", "Placed", "Projected", "Settings", "StructuredMatrix", "matrix_class"]
__all__ += [matrix.__name__ for matrix in MATRICES.values()]
