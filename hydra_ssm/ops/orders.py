"""Tokens in another order, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .._autograd import uncast
from .backend import transforming


@dataclass(frozen=True)
class Order:
    """K orders to read L tokens in: `places[k, b, i]` is the token of row b that is read as number i.

    An order that is the same for all rows stands there once.
    """

    places: Tensor  # (K, B or 1, L) int64
    inverse: Tensor  # of the same shape: when each token is read

    @classmethod
    def of(cls, places: Tensor) -> Self:
        """One order (L,), one for each row (B, L), or K of them (K, 1 or B, L).

        Raises:
            TypeError: not int32 or int64.
            ValueError: not each of 0 ... L - 1 once.
        """
        if not isinstance(places, Tensor) or places.dtype not in (torch.int32, torch.int64):
            kind = places.dtype if isinstance(places, Tensor) else type(places).__name__
            raise TypeError(f"an order must be a tensor of int64, got {kind}")
        if places.ndim not in (1, 2, 3) or 0 in places.shape:
            raise ValueError(f"an order must be (L,), (B, L) or (K, B, L), none of them 0, got {tuple(places.shape)}")
        places = places.long().reshape((1,) * (3 - places.ndim) + tuple(places.shape))
        if not torch.compiler.is_compiling():
            each = torch.arange(places.shape[-1], device=places.device)
            if not torch.equal(places.sort(-1).values, each.expand_as(places)):
                raise ValueError(f"an order of {len(each)} tokens must hold each of 0 to {len(each) - 1} once")
        return cls(places, places.argsort(-1))

    @property
    def count(self) -> int:
        """How many orders."""
        return self.places.shape[0]

    def take(self, t: Tensor) -> Tensor:
        """Tokens (B, L, ...) as they are read, those of the first order before those of the next: (K B, L, ...)."""
        return torch.cat([_reorder(t, p, i) for p, i in zip(self.places, self.inverse, strict=True)])

    def restore(self, t: Tensor) -> Tensor:
        """The sum over the orders of what is in them (K B, L, ...), each token at its place again: (B, L, ...)."""
        parts = t.chunk(self.count)
        back = [_reorder(part, i, p) for part, p, i in zip(parts, self.places, self.inverse, strict=True)]
        return back[0] if len(back) == 1 else torch.stack(back).sum(0)


Ordering = Tensor | Order  # a tensor is what `Order.of` takes


def make_orders(order: Ordering | Sequence[Ordering], shape: tuple[int, int]) -> list[Order]:
    """One order for a (B, L) batch, or several. A tensor is checked in each call, an `Order` once.

    Raises:
        ValueError, TypeError: one is no order of such a batch.
    """
    given = [order] if isinstance(order, Tensor | Order) else list(order)
    if not given:
        raise ValueError("order must hold at least one, got none")
    found = [one if isinstance(one, Order) else Order.of(one) for one in given]
    for one in found:
        _, rows, length = one.places.shape
        if length != shape[1] or rows not in (1, shape[0]):
            raise ValueError(f"order must be for (batch, length) = {shape}, got one for {(rows, length)}")
    return found


class _Reorder(torch.autograd.Function):
    """t[b, places[b]]: autograd would add gradients up as if a token could be read twice, which takes a sort."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(places, inverse)
        return _taken(t, places)

    @staticmethod
    @uncast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        places, inverse = ctx.saved_tensors
        return _reorder(grad, inverse, places), None, None


def _reorder(t: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
    if not t.is_floating_point() or not torch.is_grad_enabled() or transforming():
        return _taken(t, places)
    return _Reorder.apply(t, places, inverse)


def _taken(t: Tensor, places: Tensor) -> Tensor:
    """t (B, L, ...) by places (B or 1, L)."""
    if places.shape[0] == 1:
        return t[:, places[0]]
    return t[torch.arange(t.shape[0], device=t.device)[:, None], places]
