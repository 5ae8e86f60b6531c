"""States between chunks: S, which rows read, and its adjoint T, which the backward pass sends the other way.

Per chunk, from the states that enter it (u and v rows of features and values, decays as in decay.py):

    state <- 2^total state + sum_j w_j u_j v_j^T       S: u = B, v = x, w = dt 2^(total - column_j)
                                                       T: u = C of the row's neighbour, v = dy, w = 2^row_j

A program walks over the chunks of a few heads and one direction with their states in registers. Where heads are too
few to fill the device, it walks over a stretch of the chunks: a first walk finds what each stretch adds, a scan over
the stretches what enters each of them, and a second walk starts from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_steps


@triton.jit
def _weights(decays, steps, total, i, DIRECTION: tl.constexpr, ADJOINT: tl.constexpr, FOLDED: tl.constexpr):
    row_f, row_b, column_f, column_b = load_decays(decays, i)
    if ADJOINT:
        w = tl.exp2(row_f if DIRECTION == 0 else row_b)
    else:
        w = tl.exp2(total - (column_f if DIRECTION == 0 else column_b))
        if not FOLDED:
            dt_f, dt_b = load_steps(steps, i)
            w *= dt_f if DIRECTION == 0 else dt_b
    return w


@triton.jit
def _walk(
    u,
    v,
    decays,
    steps,
    totals,
    ids,
    states,
    borders,
    L,
    H,
    chunks,
    stretches,
    batch,
    head,
    first,
    count,
    stride_ul,
    stride_vl,
    stride_vh,
    DIRECTION: tl.constexpr,
    ADJOINT: tl.constexpr,
    BORDERS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chunks first .. first + count - 1 of HEADS heads (1 or 2), in the order that the direction reads them."""
    RIGHT: tl.constexpr = DIRECTION == ADJOINT
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, HEADS * P)
    second = (p >= P)[None, :]
    value = tl.max_contiguous(tl.multiple_of(p // P * stride_vh + p % P, P), P)
    entry = (p // P * (N * P) + p % P)[None, :] + n[:, None] * P
    slot = (DIRECTION * tl.num_programs(2) + batch).to(tl.int64)  # (direction, batch) as one number
    state = tl.zeros([N, HEADS * P], tl.float32)
    if BORDERS:
        borders += ((slot * stretches + tl.program_id(1)) * H + head) * (N * P) + entry
        if not FIRST:
            state = tl.load(borders)
    for s in tl.range(0, count, num_stages=STAGES):
        if RIGHT:
            chunk = first + s
        else:
            chunk = first + count - 1 - s
        if not FIRST:
            to = states + ((slot * chunks + chunk) * H + head) * (N * P) + entry
            tl.store(to, state.to(states.dtype.element_ty))
        begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
        limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
        inside = (i < limit)[:, None]
        vs = tl.load(v + begin * stride_vl + (i[:, None] * stride_vl + value[None, :]), mask=inside, other=0.0)
        if ADJOINT and DIRECTION == 0:
            inside = (((i > 0) | (chunk > 0)) & (i < limit))[:, None]
        if ADJOINT and DIRECTION == 1:
            inside = (i + 1 < limit)[:, None]
        from_ = (begin + ADJOINT * (2 * DIRECTION - 1)) * stride_ul
        us = tl.load(u + from_ + (i[:, None] * stride_ul + n[None, :]), mask=inside, other=0.0)
        total = tl.load(totals + chunk * 2 + DIRECTION)
        w = _weights(decays + chunk * Q * 4, steps + chunk * Q * 2, total, i, DIRECTION, ADJOINT, FOLDED)[:, None]
        g = tl.exp2(total)
        if HEADS == 2:
            total = tl.load(totals + (chunks + chunk) * 2 + DIRECTION)
            at_second = chunks * Q + chunk * Q
            other = _weights(decays + at_second * 4, steps + at_second * 2, total, i, DIRECTION, ADJOINT, FOLDED)
            w = tl.where(second, other[:, None], w)
            g = tl.where(second, tl.exp2(total), g)
        if HAS_IDS:
            here = ids + begin
            if DIRECTION == 0:
                before = tl.load(here - 1, mask=chunk > 0, other=-2)
                last = tl.load(here + tl.minimum(limit, Q) - 1)
            else:
                before = tl.load(here + Q, mask=limit > Q, other=-2)
                last = tl.load(here)
            id_ = tl.load(here + i, mask=i < limit, other=-3)
            if ADJOINT:
                w = tl.where((id_ == before)[:, None], w, 0.0)
            else:
                w = tl.where((id_ == last)[:, None], w, 0.0)
            g = tl.where(before == last, g, 0.0)
        vs = (vs.to(tl.float32) * w).to(us.dtype)
        state = tl.dot(tl.trans(us), vs, state * g, input_precision=PRECISION)
    if FIRST:
        tl.store(borders, state)


@triton.jit(do_not_specialize=["L", "chunks", "stretch"])
def _states_kernel(
    u_f,
    u_b,
    v,
    decays,
    steps,
    totals,
    ids,
    states,
    borders,
    L,
    H,
    heads_per_group,
    chunks,
    stretch,
    stride_fb,
    stride_fl,
    stride_fg,
    stride_bb,
    stride_bl,
    stride_bg,
    stride_vb,
    stride_vl,
    stride_vh,
    ADJOINT: tl.constexpr,
    BORDERS: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (directions x heads / HEADS, stretches of chunks, batch)."""
    pid = tl.program_id(0)
    direction = pid % 2
    head = pid // 2 * HEADS
    first = tl.program_id(1).to(tl.int64) * stretch
    count = tl.minimum(stretch, chunks - first)
    batch = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    decays += (batch * H + head) * (chunks * Q * 4)
    steps += (batch * H + head) * (chunks * Q * 2)
    totals += (batch * H + head) * (chunks * 2)
    ids += batch * L
    if direction == 0:
        _walk(
            u_f + batch * stride_fb + group * stride_fg, v, decays, steps, totals, ids, states, borders, L, H,
            chunks, tl.num_programs(1), batch, head, first, count, stride_fl, stride_vl, stride_vh,
            0, ADJOINT, BORDERS, FIRST, HAS_IDS, FOLDED, Q, N, P, HEADS, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _walk(
            u_b + batch * stride_bb + group * stride_bg, v, decays, steps, totals, ids, states, borders, L, H,
            chunks, tl.num_programs(1), batch, head, first, count, stride_bl, stride_vl, stride_vh,
            1, ADJOINT, BORDERS, FIRST, HAS_IDS, FOLDED, Q, N, P, HEADS, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["L", "chunks", "stretch"])
def _join_kernel(
    borders,
    totals,
    ids,
    L,
    H,
    chunks,
    stretch,
    ADJOINT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    Q: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """In place, from what each stretch adds to the state that enters it. Grid (parts of N P, H, 2 B)."""
    slot = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = tl.num_programs(2) // 2
    direction, batch = slot // size, slot % size
    totals += (batch * H + head) * (chunks * 2) + direction
    ids += batch * L
    stretches = tl.cdiv(chunks, stretch)
    state = tl.zeros([BLOCK], tl.float32)
    for s in range(stretches):
        number = tl.where(direction == ADJOINT, s, stretches - 1 - s)
        at = borders + ((slot * stretches + number) * H + head) * SIZE + entry
        own = tl.load(at)
        first = number * stretch
        end = tl.minimum(first + stretch, chunks)
        total = 0.0
        for k in range(0, stretch, CHUNKS):
            c = first + k + tl.arange(0, CHUNKS)
            total += tl.sum(tl.load(totals + c * 2, mask=c < end, other=0.0))
        g = tl.exp2(total)
        if HAS_IDS:
            after = tl.minimum(end * Q, L)
            before = tl.where(direction == 0, first * Q - 1, after)
            inside = (before >= 0) & (before < L)
            before = tl.load(ids + before, mask=inside, other=-2)
            last = tl.load(ids + tl.where(direction == 0, after - 1, first * Q))
            g = tl.where(before == last, g, 0.0)
        tl.store(at, state)
        state = state * g + own


@dataclass(frozen=True)
class StatesConfig:
    """Heads a program walks with (1 or 2), chunks of a stretch (0: all of them in one walk), warps and stages."""

    heads: int = 1
    stretch: int = 0
    warps: int = 4
    stages: int = 2


def chunk_states(
    u_f: Tensor, u_b: Tensor, v: Tensor, decays: Decays, ids: Tensor | None, Q: int, config: StatesConfig,
    precision: str, adjoint: bool,
) -> Tensor:  # fmt: skip
    """The states (2, B, chunks, H, N, P) in the dtype of v that enter each chunk, in each direction's reading order.

    u (B, L, G, N) features and v (B, L, H, P) values with unit last strides; the adjoint reads u one row off.
    """
    batch, L, H, P = v.shape
    G, N = u_f.shape[2:]
    chunks = triton.cdiv(L, Q)
    stretch = config.stretch if 0 < config.stretch < chunks else chunks
    stretches = triton.cdiv(chunks, stretch)
    states = torch.empty(2, batch, chunks, H, N, P, dtype=v.dtype, device=v.device)
    borders = None
    if stretches > 1:
        borders = torch.empty(2, batch, stretches, H, N, P, dtype=torch.float32, device=v.device)

    def walk(first: bool) -> None:
        _states_kernel[2 * H // config.heads, stretches, batch](
            u_f, u_b, v, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
            v if ids is None else ids, states, decays.sums if borders is None else borders, L, H, H // G, chunks,
            stretch, *u_f.stride()[:3], *u_b.stride()[:3], *v.stride()[:3], ADJOINT=int(adjoint),
            BORDERS=borders is not None, FIRST=first, HAS_IDS=ids is not None, FOLDED=decays.steps is None, Q=Q, N=N,
            P=P, HEADS=config.heads, PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip

    if borders is not None:
        walk(first=True)
        part = min(N * P, 256)
        _join_kernel[N * P // part, H, 2 * batch](
            borders, decays.totals, v if ids is None else ids, L, H, chunks, stretch, ADJOINT=int(adjoint),
            HAS_IDS=ids is not None, Q=Q, SIZE=N * P, BLOCK=part, CHUNKS=min(64, triton.next_power_of_2(stretch)),
            num_warps=2,
        )  # fmt: skip
    walk(first=False)
    return states
