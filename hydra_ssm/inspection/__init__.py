"""Look at the matrices of a trained model: captured, measured, drawn."""

from .alignment import Alignment, alignment
from .capture import Mixing, mixing_matrices
from .page import page
from .picture import draw
from .ranks import Promise, Ranks, promise, rank

__all__ = ["Alignment", "Mixing", "Promise", "Ranks", "alignment", "draw", "mixing_matrices", "page", "promise", "rank"]
