"""Look at the matrices of a trained model: captured, measured, drawn."""

from .alignment import Alignment, alignment
from .capture import Mixing, mixing_matrices
from .ranks import Promise, Ranks, promise, ranks

__all__ = ["Alignment", "Mixing", "Promise", "Ranks", "alignment", "mixing_matrices", "promise", "ranks"]
