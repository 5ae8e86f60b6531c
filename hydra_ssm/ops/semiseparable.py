"""The product of semiseparable triangles with a sequence: every state space mixer here is a sum of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from . import reference
from .backend import exporting, misplaced, product_misfit, takes_triton, transforming
from .chunked import chunked
from .documents import Documents
from .plain import plain
from .triangle import Triangle

EAGER = {"recurrent": reference.recurrent, "dense": reference.dense, "chunked": chunked, "plain": plain}
IMPLEMENTATIONS = (*EAGER, "triton")


def semiseparable(
    x: Tensor,
    triangles: Sequence[Triangle],
    documents: Documents | None = None,
    *,
    diagonal: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """y = (sum of the triangles + diagonal) x, with x and y (B, L, H, P); no document reads another.

    x must be zero and dt zero at padding. Under autocast "triton" computes in its dtype, and y has that dtype.

    Args:
        diagonal: (B, L, H), or None for none besides the triangles' own.
        impl: "triton" (kernels, for one triangle, or two of a kind that read opposite ways), "chunked" (O(L), eager),
            "plain" (the same in operations that can be exported and transformed), "dense" (O(L^2)) or "recurrent" (O(L)
            steps, the oracle). None takes "plain" in torch.export and under torch.func, "triton" on CUDA where it can,
            else "chunked". The first two are differentiable once, the others as often as anybody likes.

    Raises:
        ValueError: shapes do not fit, or what impl names cannot take these triangles.
        ImportError: impl is "triton", which is not installed.
    """
    _check(x, triangles, documents, diagonal)
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    ids = None if documents is None else documents.ids
    if takes_triton(impl, x, lambda: _misfit(x, triangles)):
        return _fused(x, triangles, ids, diagonal)
    y = EAGER[impl or ("plain" if exporting() or transforming() else "chunked")](x, triangles, ids)
    return y if diagonal is None else y + (diagonal[..., None] * x).to(x.dtype)


def _fused(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None, diagonal: Tensor | None) -> Tensor:
    """One pass over both triangles and the diagonal; what rows read from learned initial states comes on top."""
    from .triton import Steps, quasiseparable

    shifted = triangles[0].strict
    if not shifted:  # the kernels' triangles have no diagonal
        own = [_diagonal(t) for t in triangles]
        diagonal = reduce(torch.add, own if diagonal is None else [*own, diagonal])
    causal, anticausal = sorted(triangles if len(triangles) == 2 else _with_none(triangles[0]), key=lambda t: t.upper)
    A = causal.A if causal.A is anticausal.A else torch.stack([causal.A, anticausal.A])
    steps = Steps(causal.dt, anticausal.dt, A)
    features = (causal.B, causal.C, anticausal.B, anticausal.C)
    y = quasiseparable(x, steps, *features, ids, diagonal, shifted=shifted)
    if all(t.initial is None for t in triangles):
        return y
    return (y + reference.from_initial(x, triangles, ids)).to(y.dtype)


def _diagonal(t: Triangle) -> Tensor:
    """dt_i C_i . B_i (B, L, H) in the precision of dt."""
    along = (t.C.to(t.dt.dtype) * t.B.to(t.dt.dtype)).sum(-1)
    return t.dt * along.repeat_interleave(t.dt.shape[2] // along.shape[2], 2)


def _with_none(t: Triangle) -> list[Triangle]:
    """A triangle and an empty one that reads the other way: half of the kernels' work is for nothing then."""
    return [
        t,
        Triangle(torch.zeros_like(t.dt), t.A, torch.zeros_like(t.B), torch.zeros_like(t.C), not t.upper, t.strict),
    ]


def _misfit(x: Tensor, triangles: Sequence[Triangle]) -> str | None:
    """What the kernels need and do not get."""
    if misfit := misplaced(x):
        return misfit
    kinds = [("strict " if t.strict else "") + ("anticausal" if t.upper else "causal") for t in triangles]
    alone = len(triangles) == 1
    opposite = len(triangles) == 2 and {t.upper for t in triangles} == {False, True}
    if not alone and not (opposite and triangles[0].strict == triangles[1].strict):
        return f"needs one triangle, or a causal and an anticausal one, both strict or none, got {', '.join(kinds)}"
    shapes = [tuple(t.B.shape[2:]) for t in triangles]
    if shapes[0] != shapes[-1]:
        return f"needs the same groups and state in both triangles, got {shapes[0]} and {shapes[1]}"
    return product_misfit(x.shape[3], shapes[0][1])


def _check(x: Tensor, triangles: Sequence[Triangle], documents: Documents | None, diagonal: Tensor | None) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, heads, headdim), none of them 0, got {tuple(x.shape)}")
    if not triangles:
        raise ValueError("semiseparable needs at least one triangle")
    batch, length, heads, headdim = x.shape
    for t in triangles:
        if t.dt.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dt must be float32 or float64, as its sums are exponents, got {t.dt.dtype}")
        if t.B.ndim != 4:
            raise ValueError(f"B must be (batch, length, groups, state), got {tuple(t.B.shape)}")
        groups, state = t.B.shape[2:]
        if heads % groups:
            raise ValueError(f"the groups of B and C must divide the {heads} heads, got {groups}")
        expected = {"dt": (batch, length, heads), "A": (heads,), "B": (batch, length, groups, state)}
        expected |= {"C": expected["B"], "initial": (heads, headdim, state)}
        for name, shape in expected.items():
            given = getattr(t, name)
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(given.shape)}")
    if documents is not None and documents.ids.shape != x.shape[:2]:
        raise ValueError(f"documents must number {tuple(x.shape[:2])} tokens, got {tuple(documents.ids.shape)}")
    if diagonal is not None and diagonal.shape != x.shape[:3]:
        raise ValueError(f"diagonal must be {tuple(x.shape[:3])} for x {tuple(x.shape)}, got {tuple(diagonal.shape)}")
