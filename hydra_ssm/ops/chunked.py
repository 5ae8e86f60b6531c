"""The semiseparable product in blocks: linear in time and memory, the way of the CPU.

Inside a block of Q tokens the triangles are small matrices; between blocks each direction hands on a state. Tensors are
(batch blocks, Q, ...) here. What is large goes through in portions that fit into a cache, in place, and is computed
again for its gradient, so that little more than the inputs and the states is ever kept. Differentiable once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .._autograd import closed_form
from .reference import from_initial, log_decays
from .triangle import Triangle

PORTION = {"cpu": 512}  # tokens; other devices want few, large steps


def chunked(x: Tensor, triangles: Sequence[Triangle], ids: Tensor | None, chunk_size: int = 64) -> Tensor:
    """The sum of the triangles' products with x (B, L, H, P); ids (B, L) are document numbers."""
    batch, length = x.shape[:2]
    Q = min(chunk_size, length)

    def blocks(v: Tensor, fill: int = 0) -> Tensor:
        v = F.pad(v, (0, 0) * (v.ndim - 2) + (0, -length % Q), value=fill)
        return rearrange(v, "b (c q) ... -> (b c) q ...", q=Q)

    docs, xs = None if ids is None else blocks(ids, fill=-1), blocks(x)
    shapes: list[tuple[bool, bool]] = []
    parts: list[Tensor] = []
    for t in triangles:
        # Rows read with their neighbour's C, which may lie in the next block: fetched before the sequence is cut.
        block = replace(t, dt=blocks(t.dt), B=blocks(t.B), C=blocks(t.row_C(ids)))
        row, column = log_decays(block)
        weight, decay, read = to_and_from_states(block, row, column, docs, batch)
        state = _scan(_Summarise.apply(xs, block.B, weight), decay.exp(), batch, t.upper)
        shapes.append((t.upper, t.strict))
        parts += _Parts(block.dt, row, column, block.B, block.C, read, state)
    y = rearrange(_Product.apply(shapes, docs, xs, *parts), "(b c) q h p -> b (c q) h p", b=batch)[:, :length]
    return (y + from_initial(x, triangles, ids)).to(x.dtype)


def to_and_from_states(
    t: Triangle, row: Tensor, column: Tensor, ids: Tensor | None, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of each token in the state that leaves its block (.., Q, H), log-decay of a state over a block (.., H),
    and what each row makes of the state that enters (.., Q, H). Zero, its log -inf, from one document to another."""
    end = 0 if t.upper else -1  # the token of a block that its successor meets first
    total = column[:, end]
    last = torch.arange(column.shape[1], device=column.device) == end % column.shape[1]  # of it nothing decays
    passed = (total[:, None] - column).masked_fill(last[:, None], 0.0)
    weight, decay, read = t.dt * passed.exp(), total, row.exp()
    if ids is not None:
        leaving = ids[:, end, None]
        entering = t.step(rearrange(leaving + 2, "(b c) 1 -> b c", b=batch)) - 2  # -2 where no block comes before
        entering = rearrange(entering, "b c -> (b c) 1")
        weight = weight * (ids == leaving)[..., None]
        decay = decay.masked_fill(entering != leaving, -torch.inf)
        read = read * (entering == ids)[..., None]
    return weight, decay, read


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


class _Summarise(torch.autograd.Function):
    """What each block adds to the state: B^T (weight x), (.., G, N, H / G * P) in the dtype of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, B, weight)
        n, _, G, N = B.shape
        local = weight.new_empty(n, G, N, x.shape[2] * x.shape[3] // G)
        for at in _portions(x):
            local[at] = _groups(B[at]).mT @ _weighted(x[at], weight[at], G)
        return local

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, weight = ctx.saved_tensors
        dx, dB, dweight = torch.empty_like(x), torch.empty_like(B), torch.empty_like(weight)
        for at in _portions(x):
            local = grad[at].to(x.dtype)
            dB[at] = (_weighted(x[at], weight[at], B.shape[2]) @ local.mT).transpose(1, 2)
            dxw = _heads(_groups(B[at]) @ local, x[at])
            dweight[at] = (dxw * x[at]).sum(-1, dtype=weight.dtype)
            dx[at] = weight[at][..., None] * dxw
        return dx, dB, dweight


class _Product(torch.autograd.Function):
    """y = M x + read (C state), with M the matrices of the blocks: everything that needs (H, Q, Q) memory.

    The gradients are those of the closed form, dM = dy x^T and dx = M^T dy at their centre; log-decays get theirs from
    row and column sums, which hold their digits in blocks of up to 64 tokens.
    """

    @staticmethod
    def forward(ctx: Any, shapes: list[tuple[bool, bool]], docs: Tensor | None, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.shapes, ctx.docs = shapes, docs
        ctx.save_for_backward(x, *parts)
        y = torch.empty_like(x)
        for at in _portions(x):
            M, outer = _no_entries(x[at], parts[0].dtype), parts[0].new_zeros(x[at].shape)
            for half in _halves(shapes, docs, parts, at):
                outer.addcmul_(half.read[..., None], half.from_state(x[at]))
                half.add_to(M)
            y[at] = outer.add_((M.to(x.dtype) @ x[at].transpose(1, 2)).transpose(1, 2))
        return y

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parts = ctx.saved_tensors
        dx, dparts = torch.empty_like(x), [torch.empty_like(p) for p in parts]
        for at in _portions(x):
            xh, gh = x[at].transpose(1, 2).contiguous(), grad[at].transpose(1, 2).contiguous()
            dM, M = gh @ xh.mT, _no_entries(x[at], parts[0].dtype)
            for half, into in zip(_halves(ctx.shapes, ctx.docs, parts, at), _regroup(dparts), strict=True):
                for target, found in zip(into, half.gradients(dM, grad[at]), strict=True):
                    target[at] = found
                half.add_to(M)
            dx[at] = (M.to(x.dtype).mT @ gh).transpose(1, 2)
        return None, None, dx, *dparts


class _Parts(NamedTuple):
    """What the product takes of one triangle."""

    dt: Tensor  # (n, Q, H)
    row: Tensor  # (n, Q, H) log-decays, as in `log_decays`
    column: Tensor  # (n, Q, H)
    B: Tensor  # (n, Q, G, N)
    C: Tensor  # (n, Q, G, N) that each row reads with
    read: Tensor  # (n, Q, H) decay of the state that enters
    state: Tensor  # (n, G, N, H / G * P)


class _Half:
    """One triangle over a portion of the blocks."""

    def __init__(self, upper: bool, strict: bool, docs: Tensor | None, parts: _Parts) -> None:
        self.dt, row, column, self.B, self.C, self.read, self.state = parts
        Q, G = self.B.shape[1:3]
        keep = torch.ones(Q, Q, dtype=torch.bool, device=self.B.device)
        keep = keep.triu(int(strict)) if upper else keep.tril(-int(strict))
        if docs is not None:
            keep = keep & (docs[:, None, :, None] == docs[:, None, None, :])
        exponent = row.mT[..., :, None] - column.mT[..., None, :]
        self.decay = exponent.masked_fill_(~keep, -torch.inf).exp_()  # (n, H, Q, Q); masked before exp: no overflow
        self.scores = (_groups(self.C) @ _groups(self.B).mT).unsqueeze(2).to(self.decay.dtype)  # (n, G, 1, Q, Q)
        self.by_group = (G, -1)
        self.upper, self.first = upper, 1 + int(strict)  # places from the diagonal on which decays depend

    def add_to(self, M: Tensor) -> None:
        """Add this triangle to M (n, H, Q, Q); takes the decay's memory, so call it last."""
        weight = self.decay.mul_(self.dt.mT[..., None, :]).unflatten(1, self.by_group)
        M.unflatten(1, self.by_group).addcmul_(weight, self.scores)

    def from_state(self, like: Tensor) -> Tensor:
        """C state (n, Q, H, P)."""
        return _heads(_groups(self.C) @ self.state.to(like.dtype), like)

    def gradients(self, dM: Tensor, dy: Tensor) -> _Parts:
        """Of the parts."""
        dt = self.dt.mT
        V = (dM * self.decay).unflatten(1, self.by_group)
        K = (V * self.scores).flatten(1, 2)
        ddt = K.sum(-2)
        # Next to the diagonal nothing decays: the largest entries, whose gradients would cancel but for their rounding.
        far = K.triu_(self.first) if self.upper else K.tril_(-self.first)
        drow, dcolumn = (far @ dt.to(K.dtype)[..., None])[..., 0], -far.sum(-2) * dt
        dS = V.mul_(dt.unflatten(1, self.by_group)[..., None, :]).sum(2).to(dy.dtype)  # (n, G, Q, Q)
        state, B, C = self.state.to(dy.dtype), _groups(self.B), _groups(self.C)
        dread = (dy * self.from_state(dy)).sum(-1, dtype=self.read.dtype)
        dout = _weighted(dy, self.read, B.shape[1])
        dC = dS @ B + dout @ state.mT
        dB = dS.mT @ C
        dB, dC = dB.transpose(1, 2), dC.transpose(1, 2)
        return _Parts(ddt.mT, drow.mT, dcolumn.mT, dB, dC, dread, C.mT @ dout)


def _halves(
    shapes: Sequence[tuple[bool, bool]], docs: Tensor | None, parts: Sequence[Tensor], at: slice
) -> Iterator[_Half]:
    for (upper, strict), own in zip(shapes, _regroup(parts), strict=True):
        yield _Half(upper, strict, None if docs is None else docs[at], _Parts(*(p[at] for p in own)))


def _regroup(parts: Sequence[Tensor]) -> list[_Parts]:
    """The parts of each triangle."""
    many = len(_Parts._fields)
    return [_Parts(*parts[i : i + many]) for i in range(0, len(parts), many)]


def _no_entries(x: Tensor, dtype: torch.dtype) -> Tensor:
    n, Q, H, _ = x.shape
    return x.new_zeros(n, H, Q, Q, dtype=dtype)


def _portions(x: Tensor) -> list[slice]:
    """Slices of the blocks x (n, Q, ...), some tokens each."""
    size = max(1, PORTION.get(x.device.type, 32768) // x.shape[1])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _groups(t: Tensor) -> Tensor:
    """(n, Q, G, N) to (n, G, Q, N)."""
    return t.transpose(1, 2)


def _weighted(x: Tensor, weight: Tensor, G: int) -> Tensor:
    """weight x, (n, Q, H, P) and (n, Q, H) to (n, G, Q, H / G * P) in the dtype of x."""
    return (weight[..., None] * x).to(x.dtype).flatten(2).unflatten(2, (G, -1)).transpose(1, 2)


def _heads(t: Tensor, like: Tensor) -> Tensor:
    """(n, G, Q, H / G * P) to (n, Q, H, P)."""
    return t.transpose(1, 2).reshape(like.shape)
