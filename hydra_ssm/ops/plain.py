"""The semiseparable product in blocks, in operations that every runtime has and without a loop: what is exported.

Its gradients are autograd's, any number of them: what torch.func transforms, too.

One program for any length: the number of blocks is a size like others. Linear in time and memory but for one number for
each head and pair of blocks. Where PyTorch runs, `chunked` is faster and holds less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from .chunked import to_and_from_states
from .reference import from_initial, log_decays
from .triangle import Triangle


def plain(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None, chunk_size: int = 64) -> Tensor:
    """The sum of the triangles' products with x (B, L, H, P); ids (B, L) are document numbers."""
    (batch, length), Q = x.shape[:2], chunk_size
    place = torch.arange((length + Q - 1) // Q * Q, device=x.device)
    inside, source = place < length, place.clamp(max=length - 1)

    def blocks(v: Tensor, fill: int = 0) -> Tensor:
        # Not F.pad: an exporter cannot tell that a length rounded up by it is a multiple.
        v = torch.where(inside.reshape(-1, *(1,) * (v.ndim - 2)), v[:, source], fill)
        return v.reshape(-1, Q, *v.shape[2:])

    docs, xs = None if ids is None else blocks(ids, fill=-1), blocks(x)
    y = torch.zeros_like(xs)
    for t in triangles:
        block = replace(t, dt=blocks(t.dt), B=blocks(t.B), C=blocks(t.row_C(ids)))
        row, column = log_decays(block)
        weight, decay, read = to_and_from_states(block, row, column, docs, batch)
        state = _entering(_leaving(xs, block.B, weight), decay, batch, t.upper)
        y = y + _within(xs, block, row, column, docs) + read[..., None] * _from_state(block.C, state, xs)
    y = y.reshape(batch, -1, *x.shape[2:])[:, torch.arange(length, device=x.device)]  # a slice bounds the length
    return (y + from_initial(x, triangles, ids)).to(x.dtype)


def _within(x: Tensor, t: Triangle, row: Tensor, column: Tensor, docs: Tensor | None) -> Tensor:
    """What each token reads in its own block (n, Q, H, P)."""
    Q, G = t.B.shape[1:3]
    keep = torch.ones(Q, Q, dtype=torch.bool, device=x.device)
    first = int(t.strict)
    far = keep.triu(first + 1) if t.upper else keep.tril(-first - 1)  # nearer nothing decays: no gradient, no rounding
    keep = keep.triu(first) if t.upper else keep.tril(-first)
    if docs is not None:
        keep = keep & (docs[:, None, :, None] == docs[:, None, None, :])
    exponent = (row.mT[..., :, None] - column.mT[..., None, :]).masked_fill(~far, 0.0)
    decay = exponent.masked_fill(~keep, -torch.inf).exp() * t.dt.mT[..., None, :]  # (n, H, Q, Q)
    scores = rearrange(t.C, "n q g s -> n g q s") @ rearrange(t.B, "n q g s -> n g s q")
    M = (decay.unflatten(1, (G, -1)) * scores[:, :, None]).flatten(1, 2)
    return (M.to(x.dtype) @ x.transpose(1, 2)).transpose(1, 2)


def _leaving(x: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """What each block adds to the state (n, G, N, H / G * P)."""
    values = (weight[..., None] * x).to(x.dtype).flatten(2).unflatten(2, (B.shape[2], -1))
    return rearrange(B, "n q g s -> n g s q") @ rearrange(values, "n q g k -> n g q k")


def _entering(local: Tensor, decay: Tensor, batch: int, upper: bool) -> Tensor:
    """The state that enters each block: those that left the blocks before it, decayed; all pairs at once."""
    (G, N), H = local.shape[1:3], decay.shape[1]
    decay = rearrange(decay, "(b c) h -> b h c", b=batch)
    place = torch.arange(decay.shape[2], device=decay.device)
    before = (place + (1 if upper else -1)).clamp(min=0, max=decay.shape[2] - 1)  # the block that is read just before
    later, earlier = (place, place[:, None]) if upper else (place[:, None], place)
    between, adjacent = later > earlier, later > earlier + 1
    # Sums over the blocks strictly between two, each by itself: differences of sums would lose their digits.
    passed = torch.where(adjacent, decay[..., before, None], torch.zeros((), dtype=decay.dtype, device=decay.device))
    total = passed.flip(2).cumsum(2).flip(2) if upper else passed.cumsum(2)
    kept = total.masked_fill(~between, -torch.inf).exp()
    states = rearrange(local, "(b c) g s (e p) -> b (g e) c (s p)", b=batch, e=H // G)
    return rearrange(kept.to(local.dtype) @ states, "b (g e) c (s p) -> (b c) g s (e p)", g=G, s=N)


def _from_state(C: Tensor, state: Tensor, like: Tensor) -> Tensor:
    """C state (n, Q, H, P)."""
    return (rearrange(C, "n q g s -> n g q s") @ state).transpose(1, 2).reshape(like.shape)
