"""The semiseparable product in blocks: linear in time and memory, the way of the CPU.

Inside a block of Q tokens the triangles are small matrices; between blocks each direction hands on a state. Tensors are
(batch blocks, Q, ...) here. What is large goes through in portions that fit into a cache, and is computed again for its
gradient, so that no more than the inputs and the states is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import repeat

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .reference import block_entries, from_initial, log_decays
from .triangle import Triangle

PORTION = 512  # tokens


def chunked(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None, chunk_size: int = 64) -> Tensor:
    """The sum of the triangles' products with x (B, L, H, P); ids (B, L) are document numbers."""
    batch, length = x.shape[:2]
    Q = min(chunk_size, length)

    def blocks(v: Tensor, fill: int = 0) -> Tensor:
        v = F.pad(v, (0, 0) * (v.ndim - 2) + (0, -length % Q), value=fill)
        return rearrange(v, "b (c q) ... -> (b c) q ...", q=Q)

    docs, xs = None if ids is None else blocks(ids, fill=-1), blocks(x)
    parts: list[Tensor | None] = [xs, docs]
    for t in triangles:
        # Rows read with their neighbour's C, which may lie in the next block: fetched before the sequence is cut.
        block = replace(t, dt=blocks(t.dt), B=blocks(t.B), C=blocks(t.row_C(ids)))
        weight, decay, read = _to_and_from_states(block, docs, batch)
        local = _in_portions(_summarise, [xs, block.B, weight], Q)
        parts += [block.dt, block.B, block.C, read, _scan(local, decay, batch, t.upper)]

    def product(x: Tensor, docs: Tensor | None, *rest: Tensor) -> Tensor:
        inner, outer = [], []
        for t, (dt, B, C, read, state) in zip(triangles, zip(*[iter(rest)] * 5, strict=True), strict=True):
            inner.append(block_entries(replace(t, dt=dt, B=B, C=C), C, docs))
            y = torch.einsum("bign,bgnk->bigk", C, state.to(C.dtype)).reshape(x.shape)
            outer.append(read[..., None] * y)
        y = torch.einsum("bhij,bjhp->bihp", _total(inner).to(x.dtype), x)
        return (y + _total(outer)).to(x.dtype)

    y = rearrange(_in_portions(product, parts, Q), "(b c) q h p -> b (c q) h p", b=batch)[:, :length]
    return (y + from_initial(x, triangles, ids)).to(x.dtype)


def _to_and_from_states(t: Triangle, ids: Tensor | None, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of each token in the state that leaves its block (.., Q, H), decay of a state over a block (.., H), and
    what each row makes of the state that enters (.., Q, H). Zero from one document to another."""
    row, column = log_decays(t)
    end = 0 if t.upper else -1  # the token of a block that its successor meets first
    total = column[:, end]
    weight, decay, read = t.dt * (total[:, None] - column).exp(), total.exp(), row.exp()
    if ids is not None:
        leaving = ids[:, end, None]
        entering = t.step(rearrange(leaving + 2, "(b c) 1 -> b c", b=batch)) - 2  # -2 where no block comes before
        entering = rearrange(entering, "b c -> (b c) 1")
        weight = weight * (ids == leaving)[..., None]
        decay = decay * (entering == leaving)
        read = read * (entering == ids)[..., None]
    return weight, decay, read


def _summarise(x: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """What each block adds to the state: (.., G, N, H / G * P)."""
    weighted = (weight[..., None] * x).to(x.dtype)
    local = torch.einsum("bjgn,bjgk->bgnk", B, rearrange(weighted, "b j (g e) p -> b j g (e p)", g=B.shape[2]))
    return local.to(weight.dtype)


def _scan(local: Tensor, decay: Tensor, batch: int, reverse: bool) -> Tensor:
    """The state that enters each block: S <- decay S + local, block after block."""
    G, width = local.shape[1], local.shape[1] * local.shape[3] // decay.shape[1]
    keep = rearrange(decay.repeat_interleave(width, 1), "(b c) (g k) -> c b g 1 k", b=batch, g=G).unbind(0)
    add = rearrange(local, "(b c) ... -> c b ...", b=batch).unbind(0)
    state = torch.zeros_like(add[0])
    entering = []
    for c in reversed(range(len(add))) if reverse else range(len(add)):
        entering.append(state)
        state = torch.addcmul(add[c], keep[c], state)
    return rearrange(entering[::-1] if reverse else entering, "c b ... -> (b c) ...")


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _in_portions(f: Callable[..., Tensor], parts: Sequence[Tensor | None], block: int) -> Tensor:
    """f(*parts), some blocks at a time."""
    size = max(1, PORTION // block)
    assert parts[0] is not None
    if torch.compiler.is_compiling() or len(parts[0]) <= size:
        return f(*parts)
    again = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in parts)
    portions = zip(*(repeat(None) if v is None else v.split(size) for v in parts), strict=False)
    if not again:
        return torch.cat([f(*portion) for portion in portions])
    return torch.cat([checkpoint(f, *portion, use_reentrant=False, preserve_rng_state=False) for portion in portions])
