"""Weights of the paper's released code under the names used here.

The Hydra layer's names are the same. The ablation block keeps what belongs to its matrix under `matrix_mixer.`; here it
belongs to the block:

    released                                here
    matrix_mixer.q_matrix, k_matrix         tables.q, tables.k
    matrix_mixer.BC (L, 2 N)                tables.B, tables.C (L, 1, N) each
    matrix_mixer.bias (Cauchy's c)          c; the fixed form has none there, so 0
    matrix_mixer.dft_matrix                 dropped for "dft", which computes exact cosines; for "dense" M, one for all
                                            heads: the float32 cosines as they were, off by up to 1.1e-5
    matrix_mixer.NAME                       NAME
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PREFIX = "matrix_mixer."
_RENAMED = {"q_matrix": "tables.q", "k_matrix": "tables.k", "bias": "c"}


def convert_block(state: Mapping[str, Tensor], matrix: str, nheads: int = 1) -> dict[str, Tensor]:
    """The state dict of MatrixMixer(matrix) from that of a released layer or ablation block.

    nheads: of the mixer, for a released DFT that becomes a "dense" matrix.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        own = name.removeprefix(_PREFIX)
        if own == "BC":
            found["tables.B"], found["tables.C"] = value.unsqueeze(1).chunk(2, dim=-1)
        elif own == "dft_matrix":
            if matrix == "dense":
                found["M"] = value.expand(nheads, -1, -1)
        else:
            found[_RENAMED.get(own, own) if name.startswith(_PREFIX) else own] = value
    if matrix == "cauchy":
        found.setdefault("c", torch.zeros((), dtype=found["in_proj.weight"].dtype))
    return found
