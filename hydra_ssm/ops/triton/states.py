"""States between chunks: S, which rows read, and its adjoint T, which the backward pass sends the other way.

Per chunk, from the states that enter it (chunk-local sums of log-decays, u and v rows of features and values):

    state <- exp(total) state + sum_j w_j u_j v_j^T       S: u = B, v = x, w = dt exp(total - sum_j)
                                                          T: u = C of the row's neighbour, v = dy, w = exp(row sum)

A program walks over the chunks of one head and direction with the state in registers. Where heads are too few to fill
the device, walkers start at several places: the first pass finds each stretch's total, a scan joins them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_sum(sums, i, DIRECTION: tl.constexpr, Q: tl.constexpr):
    """Log2-decay between the chunk's border and row i: the neighbour's sum."""
    if DIRECTION == 0:
        row = tl.load(sums + i - 1, mask=i > 0, other=0.0)
    else:
        row = tl.load(sums + i + 1, mask=i < Q - 1, other=0.0)
    return row


@triton.jit
def _walk(
    u,
    v,
    sums,
    steps,
    ids,
    states,
    stretch,
    initial,
    decay,
    L,
    H,
    chunks,
    stretches,
    batch,
    head,
    part,
    first,
    stride_ul,
    stride_vl,
    DIRECTION: tl.constexpr,
    ADJOINT: tl.constexpr,
    TOTAL: tl.constexpr,
    INITIAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chunks first .. first + stretch - 1 of one (batch, head), in the order that the direction reads them."""
    RIGHT: tl.constexpr = DIRECTION == ADJOINT
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, BLOCK_P) + part * BLOCK_P
    entry = n[:, None] * P + p[None, :]
    slot = (DIRECTION * tl.num_programs(2) + batch).to(tl.int64)  # (direction, batch) as one number
    if INITIAL:
        at = ((slot * stretches + first // stretch) * H + head) * (N * P)
        state = tl.load(initial + at + entry)
    else:
        state = tl.zeros([N, BLOCK_P], tl.float32)
    product = 1.0
    count = tl.minimum(stretch, chunks - first)
    for s in tl.range(0, count, num_stages=STAGES):
        if RIGHT:
            chunk = first + s
        else:
            chunk = first + count - 1 - s
        if not TOTAL:
            at = ((slot * chunks + chunk) * H + head) * (N * P)
            tl.store(states + at + entry, state.to(states.dtype.element_ty))
        place = chunk * Q + i
        vs = tl.load(v + place[:, None] * stride_vl + p[None, :], mask=(place < L)[:, None], other=0.0)
        if ADJOINT:
            from_ = place - 1 + 2 * DIRECTION
        else:
            from_ = place
        us = tl.load(u + from_[:, None] * stride_ul + n[None, :], mask=((from_ >= 0) & (from_ < L))[:, None], other=0.0)
        here = sums + chunk * Q
        total = tl.load(here + (Q - 1) * (1 - DIRECTION))
        if ADJOINT:
            w = tl.exp2(row_sum(here, i, DIRECTION, Q))
        else:
            w = tl.exp2(total - tl.load(here + i)) * tl.load(steps + chunk * Q + i)
        g = tl.exp2(total)
        if HAS_IDS:
            if DIRECTION == 0:
                before = tl.load(ids + chunk * Q - 1, mask=chunk > 0, other=-2)
                end = tl.minimum(chunk * Q + Q, L) - 1
            else:
                before = tl.load(ids + chunk * Q + Q, mask=chunk * Q + Q < L, other=-2)
                end = chunk * Q
            last = tl.load(ids + end)
            id_ = tl.load(ids + place, mask=place < L, other=-3)
            if ADJOINT:
                w = tl.where(id_ == before, w, 0.0)
            else:
                w = tl.where(id_ == last, w, 0.0)
            g = tl.where(before == last, g, 0.0)
        us = (us.to(tl.float32) * w[:, None]).to(vs.dtype)
        state = tl.dot(tl.trans(us), vs, state * g, input_precision=PRECISION)
        product *= g
    if TOTAL:
        at = (slot * stretches + first // stretch) * H + head
        tl.store(states + at * (N * P) + entry, state)
        if part == 0:
            tl.store(decay + at, product)


@triton.jit
def _states_kernel(
    u_f,
    u_b,
    v,
    sums,
    steps,
    ids,
    states,
    initial,
    decay,
    L,
    H,
    heads_per_group,
    chunks,
    stretch,
    stretches,
    direction_stride,
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
    TOTAL: tl.constexpr,
    INITIAL: tl.constexpr,
    HAS_IDS: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (heads x directions x parts of P, stretches, batch)."""
    pid = tl.program_id(0)
    parts: tl.constexpr = P // BLOCK_P
    part = pid % parts
    direction = pid // parts % 2
    head = pid // (2 * parts)
    first = tl.program_id(1).to(tl.int64) * stretch
    batch = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    at = (batch * H + head) * (chunks * Q)
    ids += batch * L
    if direction == 0:
        _walk(
            u_f + batch * stride_fb + group * stride_fg, v, sums + at, steps + at, ids, states, stretch, initial, decay,
            L, H, chunks, stretches, batch, head, part, first, stride_fl, stride_vl,
            0, ADJOINT, TOTAL, INITIAL, HAS_IDS, Q, N, P, BLOCK_P, PRECISION, STAGES,
        )  # fmt: skip
    else:
        at += direction_stride
        _walk(
            u_b + batch * stride_bb + group * stride_bg, v, sums + at, steps + at, ids, states, stretch, initial, decay,
            L, H, chunks, stretches, batch, head, part, first, stride_bl, stride_vl,
            1, ADJOINT, TOTAL, INITIAL, HAS_IDS, Q, N, P, BLOCK_P, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def _join_kernel(totals, decay, stretches, H, ADJOINT: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """In place: from the total of each stretch to the state that enters it. Grid (parts of N P, H, 2 B)."""
    slot = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    direction = slot // (tl.num_programs(2) // 2)
    state = tl.zeros([BLOCK], tl.float32)
    for s in range(stretches):
        k = tl.where(direction == ADJOINT, s, stretches - 1 - s)
        at = (slot * stretches + k) * H + head
        total = tl.load(totals + at * SIZE + entry)
        tl.store(totals + at * SIZE + entry, state)
        state = state * tl.load(decay + at) + total


@dataclass(frozen=True)
class StatesConfig:
    """How the walk is spread: part of P a program holds, stretches, warps and stages."""

    block_p: int = 64
    stretches: int = 1
    warps: int = 4
    stages: int = 3


def chunk_states(
    u_f: Tensor, u_b: Tensor, v: Tensor, sums: Tensor, steps: Tensor, ids: Tensor | None, Q: int, config: StatesConfig,
    precision: str, adjoint: bool,
) -> Tensor:  # fmt: skip
    """The states (2, B, chunks, H, N, P) in the dtype of v that enter each chunk, in each direction's reading order.

    u (B, L, G, N) features and v (B, L, H, P) values with unit last strides; the adjoint reads u one row off.
    """
    batch, L, H, P = v.shape
    G, N = u_f.shape[2:]
    chunks = triton.cdiv(L, Q)
    states = torch.empty(2, batch, chunks, H, N, P, dtype=v.dtype, device=v.device)
    stretch = triton.cdiv(chunks, min(config.stretches, chunks))
    stretches = triton.cdiv(chunks, stretch)
    block = min(config.block_p, P)
    grid = (2 * H * (P // block), stretches, batch)
    strides = (*u_f.stride()[:3], *u_b.stride()[:3], *v.stride()[:3])
    flags = dict(
        ADJOINT=int(adjoint), HAS_IDS=ids is not None, Q=Q, N=N, P=P, BLOCK_P=block, PRECISION=precision,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    sizes = (L, H, H // G, chunks, stretch, stretches, sums.stride(0))
    tensors = (u_f, u_b, v, sums, steps, v if ids is None else ids)
    if stretches == 1:
        _states_kernel[grid](*tensors, states, states, states, *sizes, *strides, TOTAL=False, INITIAL=False, **flags)
        return states
    totals = torch.empty(2, batch, stretches, H, N, P, dtype=torch.float32, device=v.device)
    decay = torch.empty(2, batch, stretches, H, dtype=torch.float32, device=v.device)
    _states_kernel[grid](*tensors, totals, totals, decay, *sizes, *strides, TOTAL=True, INITIAL=False, **flags)
    part = min(N * P, 512)
    _join_kernel[(N * P // part, H, 2 * batch)](
        totals, decay, stretches, H, ADJOINT=int(adjoint), SIZE=N * P, BLOCK=part, num_warps=2
    )
    _states_kernel[grid](*tensors, states, totals, decay, *sizes, *strides, TOTAL=False, INITIAL=True, **flags)
    return states
