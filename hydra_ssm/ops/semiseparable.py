"""The product of semiseparable triangles with a sequence: every state space mixer here is a sum of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .chunked import chunked
from .documents import Documents
from .triangle import Triangle

IMPLEMENTATIONS = {"recurrent": reference.recurrent, "dense": reference.dense, "chunked": chunked}


def semiseparable(
    x: Tensor, triangles: Sequence[Triangle], documents: Documents | None = None, *, impl: str | None = None
) -> Tensor:
    """y = (sum of the triangles) x, with x and y (B, L, H, P); no document reads another.

    impl: "chunked" (O(L), the default), "dense" (O(L^2)) or "recurrent" (O(L) steps, the oracle).
    x must be zero and dt zero at padding. Raises ValueError where shapes do not fit.
    """
    _check(x, triangles, documents)
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    ids = None if documents is None else documents.ids
    return IMPLEMENTATIONS[impl or "chunked"](x, triangles, ids)


def _check(x: Tensor, triangles: Sequence[Triangle], documents: Documents | None) -> None:
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
