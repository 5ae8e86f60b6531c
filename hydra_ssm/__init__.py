"""Bidirectional state space models as structured matrix mixers: Y = M X."""

from .encoder import Encoder, EncoderLayer, undecayed
from .matrices import MATRICES, StructuredMatrix
from .mixer import Hydra, MatrixMixer, SelfAttention
from .released import convert_block

__version__ = "0.1.0.dev0"
__all__ = [
    "MATRICES",
    "Encoder",
    "EncoderLayer",
    "Hydra",
    "MatrixMixer",
    "SelfAttention",
    "StructuredMatrix",
    "convert_block",
    "undecayed",
]
