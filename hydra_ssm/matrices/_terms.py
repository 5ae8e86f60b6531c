"""Sums of matrices over the features of a query and a key, without holding a matrix for each term."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .._autograd import closed_form
from ..ops.backend import transforming

Term = Callable[[Tensor, Tensor], Tensor]


def sum_over_features(term: Term, q: Tensor, k: Tensor) -> Tensor:
    """sum_d term(q_d, k_d) (B, H, L, L) for q and k (B, L, H, d) and a term of (B, H, L, 1) and (B, H, 1, L).

    Terms are computed one by one, and again for the gradient: memory stays that of a few (B, H, L, L).
    """
    if transforming():  # which takes no gradient in a closed form
        pairs = zip(q.unbind(-1), k.unbind(-1), strict=True)
        return reduce(torch.add, [term(one.mT[..., None], other.mT[..., None, :]) for one, other in pairs])
    return _Sum.apply(term, q.permute(3, 0, 2, 1)[..., :, None], k.permute(3, 0, 2, 1)[..., None, :])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: Term, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.term = term
        ctx.save_for_backward(rows, columns)
        total = term(rows[0], columns[0])
        for row, column in zip(rows[1:], columns[1:], strict=True):
            total += term(row, column)
        return total

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        rows, columns = ctx.saved_tensors
        found = []
        for row, column in zip(rows, columns, strict=True):
            leaves = row.detach().requires_grad_(), column.detach().requires_grad_()
            with torch.enable_grad():
                one = ctx.term(*leaves)
            found.append(torch.autograd.grad(one, leaves, grad))
        drow, dcolumn = (torch.stack(grads) for grads in zip(*found, strict=True))
        return None, drow, dcolumn
