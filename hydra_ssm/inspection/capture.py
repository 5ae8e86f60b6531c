"""The matrices that the mixers of a model applied to an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..matrices import StructuredMatrix
from ..mixer import MatrixMixer
from ..ops import Documents, layout


@dataclass(frozen=True)
class Mixing:
    """What one mixer did with one input."""

    layer: int  # number of the mixer in the model, from 0
    name: str  # of the module, such as model.encoder.layers.0.mixer
    mixer: MatrixMixer
    heads: tuple[int, ...]  # whose matrices are here
    matrices: tuple[Tensor, ...]  # (heads, n, n) for each document of n tokens, without padding
    missing: str = ""  # why there is no matrix, where the class has none
    factors: tuple[Mixing, ...] = ()  # then these, whose products with x the class multiplies
    way: str = ""  # how a factor reads: → from left to right, or ←

    @property
    def label(self) -> str:
        """Number of the layer, and of a factor its way."""
        return f"{self.layer} {self.way}".rstrip()


def mixing_matrices(
    model: nn.Module,
    *inputs: Any,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **options: Any,
) -> list[Mixing]:
    """Run model(*inputs, **options) and return the matrix that each of its mixers applied, in the order of their calls.

    For any module that holds MatrixMixers: a mixer itself, an Encoder, the models of `hydra_ssm.text`, a stack of
    different classes. What the model returns is not changed, and not returned. Documents are the rows of the batch, or
    what `cu_seqlens` says; rows and columns of padding are left out.

        found = mixing_matrices(model, **tokenizer("a sentence", return_tensors="pt"))
        found[2].matrices[0]  # (heads, tokens, tokens) of layer 2; entry (i, j): how token i reads token j

    The matrices are in the model's dtype and differentiable: call this under `torch.no_grad()` to look alone. What a
    block adds to the product is not in them: the identity of classes without a diagonal, learned initial states.

    Args:
        layers: numbers of mixers to look at, from 0 in the order of the model's modules; None: all.
        heads: of these heads alone, as far as a mixer has them; None: all.

    Raises:
        ValueError: the model has no mixer, or not these layers and heads.
    """
    mixers = [(name, module) for name, module in model.named_modules() if isinstance(module, MatrixMixer)]
    if not mixers:
        raise ValueError(f"the model must hold a MatrixMixer, {type(model).__name__} holds none")
    check_numbers("layers", layers, len(mixers))
    check_numbers("heads", heads, max(mixer.settings.nheads for _, mixer in mixers))
    found: list[Mixing] = []
    handles = []
    for layer, (name, mixer) in enumerate(mixers):
        if layers is None or layer in layers:
            hook = partial(_record, found, layer, name, heads)
            handles.append(mixer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        model(*inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_numbers(what: str, numbers: Sequence[int] | None, count: int) -> None:
    """Raise ValueError unless all are at least 0 and below count."""
    wrong = [number for number in numbers or () if not 0 <= number < count]
    if wrong:
        raise ValueError(f"{what} must be numbers from 0 to {count - 1}, got {wrong[0]}")


def _record(
    found: list[Mixing],
    layer: int,
    name: str,
    heads: Sequence[int] | None,
    mixer: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    assert isinstance(mixer, MatrixMixer)
    given = dict(zip(("u", "mask", "cu_seqlens"), inputs, strict=False)) | options
    own = tuple(h for h in range(mixer.settings.nheads) if heads is None or h in heads)
    kept = partial(_kept, Mixing(layer, name, mixer, own, ()))
    try:
        found.append(kept(_matrices(mixer, lambda matrix: matrix, **given)))
    except TypeError as error:  # what dense() raises where a class has no matrix
        if not mixer.matrix_class.ways:
            raise
        parts = (kept(_matrices(mixer, partial(_factor, way), **given), way) for way in mixer.matrix_class.ways)
        found.append(Mixing(layer, name, mixer, own, (), str(error), tuple(parts)))


def _kept(mixing: Mixing, whole: tuple[Tensor, ...], way: str = "") -> Mixing:
    return replace(mixing, matrices=tuple(M[list(mixing.heads)] for M in whole), way=way)


def _factor(way: str, matrix: StructuredMatrix) -> StructuredMatrix:
    return matrix.factor(way)


def _matrices(
    mixer: MatrixMixer,
    look: Callable[[StructuredMatrix], StructuredMatrix],
    u: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, ...]:
    """(H, n, n) for each document."""
    place = layout((u.shape[0], u.shape[1]), mask, cu_seqlens)
    if place is not None:
        u, documents = place.take(u), place.documents
    M = look(mixer.matrix(u, documents=documents)).dense()
    if documents is None:
        return M.unbind()
    if documents.cu_seqlens is None:
        return tuple(own[:, :n, :n] for own, n in zip(M, documents.lengths, strict=True))
    return tuple(M[0, :, start:end, start:end] for start, end in pairwise(documents.cu_seqlens.tolist()))
