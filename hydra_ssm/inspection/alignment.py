"""Whether a class is sequence aligned: change one token, and look at which entries of the matrix move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..matrices import Inputs, Settings, StructuredMatrix, matrix_class

MOVED = 1e-9  # relative to the largest entry; rounding of float64 moves none so far

Kind = Literal["aligned", "leading blocks", "up to row factors", "no", "no token owns a parameter"]


@dataclass(frozen=True)
class Alignment:
    """How the entries of a class hang on its tokens.

    aligned: every diagonal block M[i:j+1, i:j+1] depends on tokens i to j alone.
    leading blocks: that holds for those that begin at 0, M[:j+1, :j+1], which is what the paper's Definition 2.2 asks.
    up to row factors: it holds once each row is divided by its entry on the diagonal, as for a softmax's.
    no: blocks depend on tokens outside of them.
    no token owns a parameter: there is nothing to be aligned; the class has a fixed form alone.
    """

    kind: Kind
    moved: Tensor  # (L, L, L) bool: [k, i, j] is True where changing token k changes entry (i, j) of a head


def alignment(matrix: str | type[StructuredMatrix], *, length: int = 9, order: int = 3) -> Alignment:
    """Test a class on random tokens in float64.

    A token is what the class receives of it: its features and its values x. (In a block the short convolution comes
    before that, so that a token's features depend on its neighbours in the input, too: the class is the same.)

    Args:
        matrix: a name in `hydra_ssm.MATRICES` or a StructuredMatrix class.
        length: tokens of the example.
        order: of the class (`d_state`).

    Raises:
        ValueError: there is no class of this name.
        TypeError: it is no class of matrices, or one without a matrix, as mult.
    """
    matrix = matrix_class(matrix)
    settings = Settings(nheads=2, headdim=2, d_state=order, max_length=length)
    # The first of the batch is the example; in number k + 1 token k is another.
    M = matrix.build(_one_token_changed(matrix, settings, length)).dense()
    moved = _moved(M)
    if not matrix.features(settings):
        return Alignment("no token owns a parameter", moved)
    if _inside(moved):
        return Alignment("aligned", moved)
    if _inside(moved, leading=True):
        return Alignment("leading blocks", moved)
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    if diagonal.abs().min() > 1e-6 * M.abs().max():
        scaled = _moved(M / diagonal[..., None])
        if scaled.any() and _inside(scaled):
            return Alignment("up to row factors", moved)
    return Alignment("no", moved)


def _one_token_changed(matrix: type[StructuredMatrix], settings: Settings, length: int) -> Inputs:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = {name: value.double() for name, value in matrix.parameters(settings).items()}
        x = _varied(length, settings.nheads, settings.headdim)
        features = {f.name: _varied(length, *f.shape) for f in matrix.features(settings)}
    return Inputs(x, features, parameters, settings, None)


def _varied(length: int, *shape: int) -> Tensor:
    """(length + 1, length, *shape): random values, and the same with those of one token replaced by others."""
    values, others = torch.randn(2, length, *shape, dtype=torch.float64)
    batch = values.repeat(length + 1, *(1 for _ in values.shape))
    place = torch.arange(length)
    batch[place + 1, place] = others
    return batch


def _moved(M: Tensor) -> Tensor:
    """(L, L, L) of M (L + 1, H, L, L)."""
    return ((M[1:] - M[0]).abs() > MOVED * M[0].abs().max()).any(1)


def _inside(moved: Tensor, leading: bool = False) -> bool:
    """Whether token k moves entry (i, j) only if it lies between i and j, or, for leading blocks, before the larger."""
    k, i, j = torch.meshgrid(*(torch.arange(len(moved)),) * 3, indexing="ij")
    allowed = k <= torch.maximum(i, j)
    if not leading:
        allowed &= k >= torch.minimum(i, j)
    return not (moved & ~allowed).any()
