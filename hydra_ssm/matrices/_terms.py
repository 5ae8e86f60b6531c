"""Sums of matrices over the features of a query and a key, without holding a matrix for each term."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_over_features(term: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """sum_d term(q_d, k_d) (B, H, L, L) for q and k (B, L, H, d) and a term of (B, H, L, 1) and (B, H, 1, L).

    Terms are computed one by one, and again for the gradient: memory stays that of a few (B, H, L, L).
    """
    rows, columns = q.permute(3, 0, 2, 1)[..., :, None], k.permute(3, 0, 2, 1)[..., None, :]
    total = None
    for row, column in zip(rows, columns, strict=True):
        if torch.is_grad_enabled() and (row.requires_grad or column.requires_grad):
            one = checkpoint(term, row, column, use_reentrant=False, preserve_rng_state=False)
        else:
            one = term(row, column)
        total = one if total is None else total + one
    assert isinstance(total, Tensor)
    return total
