"""Semiseparable products in eager PyTorch by definition: recurrent (the oracle) and dense.

Each takes x (B, L, H, P), triangles and document numbers (B, L) or None, and returns the sum of the triangles'
products with x. The recurrence is written from the definition (flip, scan, shift), the other two from the entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from .documents import starts
from .triangle import Triangle


def recurrent(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None) -> Tensor:
    """One step a token: h <- exp(a) h + dt x B^T, y = h C, then the shift. Slow, and the oracle."""
    return torch.stack([_recurrence(x, t, ids) for t in triangles]).sum(0).to(x.dtype)


def _recurrence(x: Tensor, t: Triangle, ids: Tensor | None) -> Tensor:
    H, P, N = x.shape[2], x.shape[3], t.B.shape[3]
    ids = x.new_zeros(x.shape[:2], dtype=torch.long) if ids is None else ids
    a, dt, x, B, C, ids = (v.flip(1) if t.upper else v for v in (t.log_decay, t.dt, x, t.B, t.C, ids))
    B, C = (v.repeat_interleave(H // v.shape[2], dim=2) for v in (B, C))
    initial = dt.new_zeros(H, P, N) if t.initial is None else t.initial
    fresh = starts(ids)[..., None, None]
    state = initial.expand(x.shape[0], H, P, N)
    previous = x.new_zeros(x.shape[0], H, P)
    ys = []
    steps = zip(*(v.unbind(1) for v in (fresh, a.exp(), dt[..., None] * x, B, C)), strict=True)
    for first, decay, value, b, c in steps:
        state = torch.where(first[..., None], initial, state)
        previous = previous.masked_fill(first, 0.0)
        state = decay[..., None, None] * state + value[..., None] * b[..., None, :]
        current = (state @ c.to(state.dtype)[..., None])[..., 0]
        ys.append(previous if t.strict else current)
        previous = current
    y = torch.stack(ys, dim=1)
    return y.flip(1) if t.upper else y


def dense(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None) -> Tensor:
    """Through the L x L matrix: O(L^2), for short sequences, pictures of M, and export."""
    M = torch.stack([entries(t, ids) for t in triangles]).sum(0)
    return (torch.einsum("bhij,bjhp->bihp", M.to(x.dtype), x) + from_initial(x, triangles, ids)).to(x.dtype)


def entries(t: Triangle, ids: Tensor | None) -> Tensor:
    """The triangle as a (B, H, L, L) matrix, without its initial state."""
    L, G = t.B.shape[1:3]
    keep = torch.ones(L, L, dtype=torch.bool, device=t.B.device)
    keep = keep.triu(int(t.strict)) if t.upper else keep.tril(-int(t.strict))
    if ids is not None:
        keep = keep & rearrange(ids[:, :, None] == ids[:, None, :], "b i j -> b 1 i j")
    # Differences of sums over the whole sequence: float64 keeps their digits. The mask comes before exp.
    row, column = (rearrange(v, "b l h -> b h l") for v in log_decays(replace(t, dt=t.dt.to(widest(t.dt)))))
    exponent = (row[..., :, None] - column[..., None, :]).to(t.dt.dtype)
    weight = exponent.masked_fill(~keep, -torch.inf).exp() * rearrange(t.dt, "b l h -> b h 1 l")
    scores = torch.einsum("bign,bjgn->bgij", t.row_C(ids), t.B)
    return (weight.unflatten(1, (G, -1)) * scores[:, :, None]).flatten(1, 2)


def widest(t: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return t.dtype if t.device.type == "mps" else torch.float64


def log_decays(t: Triangle) -> tuple[Tensor, Tensor]:
    """(row, column), each (B, L, H): the log-decay from token j to row i is row_i - column_j."""
    a = t.log_decay
    column = a.flip(1).cumsum(1).flip(1) if t.upper else a.cumsum(1)
    return (t.step(column) if t.strict else column), column


def from_initial(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None) -> Tensor | float:
    """What each row reads from the initial states, decayed since its document's start."""
    y: Tensor | float = 0.0
    for t in triangles:
        if t.initial is not None:
            G = t.B.shape[2]
            C = t.row_C(ids)
            read = torch.einsum("gepn,bign->bigep", t.initial.unflatten(0, (G, -1)).to(C.dtype), C).flatten(2, 3)
            y = y + _decay_since_start(t, ids)[..., None] * read
    return y


def _decay_since_start(t: Triangle, ids: Tensor | None) -> Tensor:
    """(B, L, H) exp of the sum of a row's log-decays since the start of its document."""
    a = t.log_decay
    ids = torch.zeros(a.shape[:2], dtype=torch.long, device=a.device) if ids is None else ids
    if t.upper:
        a, ids = a.flip(1), ids.flip(1)
    # One sum over the row, and its value before each document taken off: float64 keeps the difference exact enough.
    total = a.cumsum(1, dtype=widest(a))
    place = torch.arange(a.shape[1], device=a.device).expand_as(ids)
    start = place.where(starts(ids), 0).cummax(1).values
    base = (total - a).gather(1, start[..., None].expand_as(total))
    row = total - a if t.strict else total
    since = (row - base).to(a.dtype).exp()
    return since.flip(1) if t.upper else since
