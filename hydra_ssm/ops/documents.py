"""Where the tokens of each document lie in a batch, and how to bring any batch into that form.

Padding and packing are one problem: which tokens may see each other. Every batch is first brought into one of two
forms, rows that hold one document each with the padding at their end, or one row that holds many documents back to
back. Operations then need one fact a token: the number of its document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Document numbers of the tokens of a (B, L) batch, in either form above.

    A document is a run of equal numbers; padding, numbered -1, comes last in its row.
    """

    ids: Tensor  # (B, L) int64, -1 where there is no token
    cu_seqlens: Tensor | None = None  # (documents + 1,) offsets, where one row holds many documents
    at_most: int | None = None  # tokens of a packed document, where the host knows; the same for many batches

    @property
    def packed(self) -> bool:
        """True where one row holds many documents."""
        return self.cu_seqlens is not None

    @property
    def valid(self) -> Tensor:
        """(B, L) True where there is a token."""
        return self.ids >= 0

    @property
    def positions(self) -> Tensor:
        """(B, L) index of each token in its document, something below L at padding."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        if not self.packed:
            return place.where(self.valid, 0)
        return place - place.where(starts(self.ids), 0).cummax(1).values

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document. The one fact that has to leave the device, so it is asked for at need, and once."""
        return tuple((self.valid.sum(1) if self.cu_seqlens is None else self.cu_seqlens.diff()).tolist())

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Documents:
        """The same on another device: where a model's layers are spread over several, whoever spreads them asks."""
        offsets = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=non_blocking)
        return Documents(self.ids.to(device, non_blocking=non_blocking), offsets, self.at_most)

    def zero_padding(self, t: Tensor) -> Tensor:
        """`t` (B, L, ...) with zeros, which no gradient passes, where there is no token."""
        return zero_padding(t, self.valid)


def zero_padding(t: Tensor, mask: Tensor | None) -> Tensor:
    """`t` (B, L, ...) with zeros, which no gradient passes, where `mask` (B, L) is False; None: it is nowhere."""
    if mask is None:
        return t
    return torch.where(
        mask.reshape(mask.shape + (1,) * (t.ndim - 2)), t, torch.zeros((), dtype=t.dtype, device=t.device)
    )


def starts(ids: Tensor) -> Tensor:
    """(B, L) True at the first token of each run of equal numbers."""
    first = torch.ones_like(ids[:, :1], dtype=torch.bool)
    return torch.cat([first, ids[:, 1:] != ids[:, :-1]], dim=1)


@dataclass(frozen=True)
class Layout:
    """A batch seen from another grid: token t of the inner grid is token `source[t]` of the outer one.

    `take` goes in, `restore` comes back; both put zeros where there is no token.
    """

    documents: Documents  # of the inner grid (B', L')
    source: Tensor | None  # (B', L') flat index into the outer grid; None: the grids are the same
    target: Tensor | None  # (B, L) flat index into the inner grid
    valid: Tensor | None  # (B, L) True for tokens of the outer grid; None: all

    def take(self, t: Tensor) -> Tensor:
        """Tokens of the outer grid (B, L, ...) in the inner grid (B', L', ...)."""
        if self.source is None:
            return t
        return self.documents.zero_padding(t.flatten(0, 1)[self.source])

    def restore(self, t: Tensor) -> Tensor:
        """Tokens of the inner grid (B', L', ...) in the outer grid (B, L, ...)."""
        if self.target is None:
            return t
        return zero_padding(t.flatten(0, 1)[self.target], self.valid)


def layout(shape: tuple[int, int], mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout | None:
    """The layout of a (B, L) batch whose tokens are where `mask` is True, packed as `cu_seqlens` says.

    None where there is neither: every row is a document. Raises ValueError or TypeError where they do not fit.
    """
    B, L = shape
    if mask is not None:
        _check_mask(mask, shape)
    at_most = None if cu_seqlens is None else _check_cu_seqlens(cu_seqlens, shape)
    if mask is not None:
        row, place = torch.arange(B, device=mask.device)[:, None] * L, torch.arange(L, device=mask.device)
        upto, many = mask.cumsum(1), mask.sum(1, keepdim=True)
        order = torch.where(mask, upto - 1, many + place - upto)  # tokens first, each group in its order
        source = row + torch.empty_like(order).scatter(1, order, place.expand_as(order))
        target = row + order
        if cu_seqlens is None:
            ids = torch.where(place < many, 0, -1)
            return Layout(Documents(ids), source, target, mask)
        before = torch.cat([mask.new_zeros(1, dtype=torch.long), mask[0].cumsum(0)])
        return Layout(_packed(before[cu_seqlens.long()], L, at_most), source, target, mask)
    if cu_seqlens is not None:
        return Layout(_packed(cu_seqlens.long(), L, at_most), None, None, None)
    return None


def per_document(
    f: Callable[[Tensor, Documents | None], Tensor], u: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """f(u, documents) for u (B, L, D), brought into the form that f wants and back; zeros at padding.

    In a packed row a product's zeros do not stop NaN or infinity (0 * NaN is NaN): a document that holds one comes out
    as NaN, and f never sees it. What overflows inside f is f's.
    """
    place = layout((u.shape[0], u.shape[1]), mask, cu_seqlens)
    if place is None:
        return f(u, None)
    inner, documents = place.take(u), place.documents
    if documents.cu_seqlens is None:
        return place.restore(f(inner, documents))
    broken = ~inner.isfinite().all(-1)
    ids = documents.ids.clamp(min=0)  # padding is zero: it breaks no document
    spread = torch.zeros_like(documents.cu_seqlens).index_add(0, ids[0], broken[0].long())[ids]
    inner = torch.where(broken[..., None], torch.zeros((), dtype=u.dtype, device=u.device), inner)
    y = f(inner, documents)
    lost = (spread > 0).reshape(spread.shape + (1,) * (y.ndim - 2))
    return place.restore(y.masked_fill(lost, torch.nan))


def rows(documents: Documents) -> list[Layout]:
    """Layouts that give each document a row of its own, documents of like lengths together.

    A layout holds those between two powers of two, so that less than half of it is padding. Where no document has a
    token, one row of padding stands for all.
    """
    batch, width = documents.ids.shape
    lengths = documents.lengths
    starts = [0, *accumulate(lengths)] if documents.packed else range(0, batch * width, width)
    buckets: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        if length:
            buckets.setdefault((length - 1).bit_length(), []).append(number)
    buckets = buckets or {0: [0]}
    return [
        _bucket(documents, torch.tensor([starts[n] for n in own]), torch.tensor([lengths[n] for n in own]))
        for own in buckets.values()
    ]


def _bucket(documents: Documents, start: Tensor, length: Tensor) -> Layout:
    batch, width = documents.ids.shape
    longest, device = max(1, int(length.max())), documents.ids.device
    start, length, place = start.to(device), length.to(device), torch.arange(longest, device=device)
    inside = place < length[:, None]
    source = torch.where(inside, start[:, None] + place, 0)
    target = torch.full((batch * width,), -1, device=device)
    target[source[inside]] = torch.arange(source.numel(), device=device).reshape(source.shape)[inside]
    target = target.reshape(batch, width)
    return Layout(Documents(torch.where(inside, 0, -1)), source, target.clamp(min=0), target >= 0)


def _packed(cu_seqlens: Tensor, L: int, at_most: int | None) -> Documents:
    place = torch.arange(L, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens, place, right=True) - 1
    ids = torch.where(place < cu_seqlens[-1], ids, -1)
    return Documents(rearrange(ids, "l -> 1 l"), cu_seqlens, at_most)


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor, True for tokens, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for tokens, got {mask.dtype}: pass mask.bool()")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask must be (batch, length) = {tuple(shape)}, got {tuple(mask.shape)}")


def _check_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int]) -> int | None:
    """A power of two (or L) that no document is longer than, where the values are known."""
    B, L = shape
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor of offsets, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, got batch {B}: flatten it to (1, {B * L}, ...)")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be (documents + 1,) offsets from 0 to {L}, got {tuple(cu_seqlens.shape)}")
    if torch.compiler.is_compiling():
        return None  # while tracing they are not
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != L:
        raise ValueError(f"cu_seqlens must run from 0 to the row's length {L}, got {offsets[0]} to {offsets[-1]}")
    if any(later < earlier for earlier, later in pairwise(offsets)):
        raise ValueError("cu_seqlens must not decrease")
    longest = max(later - earlier for earlier, later in pairwise(offsets))
    return min(L, 1 << (longest - 1).bit_length())
