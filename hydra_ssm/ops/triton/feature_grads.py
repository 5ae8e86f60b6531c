"""Gradients of B and C through the states, added to the chunks' own part, and what dt and A need of the states.

Per direction, with S entering the chunk that is read and T its adjoint coming the other way:

    dC = (the tiles' part) + sum_h 2^row dy S^T                       Rst_i = (2^row dy S^T)_i . C_i
    dB = (the tiles' part) + sum_h dt 2^(total - column) x T^T        Cst_j = (dt 2^(total - column) x T^T)_j . B_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_steps
from .value_grads import TileSums


@triton.jit
def _half(
    v,
    u,
    decays,
    steps,
    totals,
    ids,
    states,
    other_states,
    dfeatures,
    sums,
    products,
    du,
    L,
    G,
    chunks,
    chunk,
    part,
    shares,
    feature_stride,
    program_stride,
    stride_vl,
    stride_vh,
    stride_ul,
    DIRECTION: tl.constexpr,
    READS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    PAIR: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One direction's C (READS: u = C, v = dy, states = S) or B (u = B, v = x, states = T)."""
    i = part * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (i < limit)[:, None]
    exists = inside
    shift = 0
    if READS:  # a row's C is its neighbour's
        shift = 2 * DIRECTION - 1
        if DIRECTION == 0:
            exists = (((i > 0) | (chunk > 0)) & (i < limit))[:, None]
        else:
            exists = (i + 1 < limit)[:, None]
    grad = tl.zeros([ROWS, N], tl.float32)
    dfeatures += i[:, None] * N + n[None, :]
    for s in range(shares):
        grad += tl.load(dfeatures + s * program_stride + (DIRECTION * 2 + READS) * feature_stride)
        if PAIR and READS:
            beside = ((i >= Q // 2) == (DIRECTION == 0))[:, None]
            grad += tl.load(dfeatures + s * program_stride + feature_stride * 4, mask=beside, other=0.0)
    if HAS_STATES:
        us = u + (begin + shift) * stride_ul + (i[:, None] * stride_ul + n[None, :])
        us = tl.load(us, mask=exists, other=0.0).to(tl.float32)
        if HAS_IDS:
            ids += begin
            if DIRECTION == 0:
                before = tl.load(ids - 1, mask=chunk > 0, other=-2)
                last = tl.load(ids + tl.minimum(limit, Q) - 1)
            else:
                before = tl.load(ids + Q, mask=limit > Q, other=-2)
                last = tl.load(ids)
            id_ = tl.load(ids + i, mask=i < limit, other=-3)
            allowed = (id_ == (before if READS else last)).to(tl.float32)
            keep = (before == last).to(tl.float32)
        vs = v + begin * stride_vl + (i[:, None] * stride_vl + p[None, :])
        entry = n[:, None] * P + p[None, :]
        for h in tl.range(0, HEADS, num_stages=STAGES):
            row_f, row_b, column_f, column_b = load_decays(decays + h * (chunks * Q * 4), i)
            total = tl.load(totals + h * chunks * 2 + DIRECTION)
            if READS:
                weight = tl.exp2(row_f if DIRECTION == 0 else row_b)
            else:
                weight = tl.exp2(total - (column_f if DIRECTION == 0 else column_b))
                if not FOLDED:
                    dt_f, dt_b = load_steps(steps + h * (chunks * Q * 2), i)
                    weight *= dt_f if DIRECTION == 0 else dt_b
            if HAS_IDS:
                weight *= allowed
            values = tl.load(vs + h * stride_vh, mask=inside, other=0.0)
            state = tl.load(states + h * (N * P) + entry)
            through = tl.dot(values, tl.trans(state), input_precision=PRECISION) * weight[:, None]
            grad += through
            tl.store(sums + h * (chunks * Q) + i, tl.sum(through * us, 1))
            if READS and part == 0:
                other = tl.load(other_states + h * (N * P) + entry)
                if PACKED:
                    product = tl.sum((state * other).to(tl.float32))
                else:
                    product = tl.sum(state.to(tl.float32) * other.to(tl.float32))
                g = tl.exp2(total)
                if HAS_IDS:
                    g *= keep
                tl.store(products + h * chunks, g * product)
    place = begin + i
    if READS:
        # The row without a neighbour has no C to write: its zeros go to the C that nobody reads.
        grad = tl.where(exists, grad, 0.0)
        if DIRECTION == 0:
            place = tl.where(place > 0, place - 1, L - 1)
        else:
            place = tl.where(place < L - 1, place + 1, 0)
    tl.store(du + place[:, None] * (G * N) + n[None, :], grad.to(du.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "chunks", "shares", "G"])
def _feature_grads_kernel(
    x,
    dy,
    B_f,
    C_f,
    B_b,
    C_b,
    decays,
    steps,
    totals,
    ids,
    states,
    adjoint,
    dfeatures,
    sums,
    products,
    dB_f,
    dC_f,
    dB_b,
    dC_b,
    L,
    G,
    chunks,
    shares,
    sums_stride,
    product_stride,
    feature_stride,
    program_stride,
    state_stride,
    stride_xb,
    stride_xl,
    stride_xh,
    stride_yb,
    stride_yl,
    stride_yh,
    stride_Bfb,
    stride_Bfl,
    stride_Bfg,
    stride_Cfb,
    stride_Cfl,
    stride_Cfg,
    stride_Bbb,
    stride_Bbl,
    stride_Bbg,
    stride_Cbb,
    stride_Cbl,
    stride_Cbg,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    PAIR: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks G (Q / ROWS) directions, B or C); HEADS are all of a group."""
    pid = tl.program_id(0).to(tl.int64)
    kind = pid % 4
    parts: tl.constexpr = Q // ROWS
    part = (pid // 4 % parts).to(tl.int32)
    group = pid // (4 * parts) % G
    chunk = pid // (4 * parts * G) % chunks
    batch = pid // (4 * parts * G * chunks)
    head0 = group * HEADS
    first = batch * G * HEADS + head0
    decays += (first * chunks + chunk) * (Q * 4)
    steps += (first * chunks + chunk) * (Q * 2)
    totals += (first * chunks + chunk) * 2
    sums += (first * chunks + chunk) * Q
    products += first * chunks + chunk
    ids += batch * L
    x += batch * stride_xb + head0 * stride_xh
    dy += batch * stride_yb + head0 * stride_yh
    at = ((batch * chunks + chunk) * G + group) * (HEADS * N * P)
    dfeatures += ((batch * G + group) * chunks + chunk) * (Q * N)
    out = (batch * L * G + group) * N
    if kind == 0:
        _half(
            dy, C_f + batch * stride_Cfb + group * stride_Cfg, decays, steps, totals, ids,
            states + at, adjoint + at, dfeatures, sums, products, dC_f + out,
            L, G, chunks, chunk, part, shares, feature_stride, program_stride, stride_yl, stride_yh, stride_Cfl,
            0, 1, HEADS, HAS_IDS, HAS_STATES, FOLDED, PACKED, PAIR, Q, ROWS, N, P, PRECISION, STAGES,
        )  # fmt: skip
    elif kind == 1:
        _half(
            x, B_f + batch * stride_Bfb + group * stride_Bfg, decays, steps, totals, ids,
            adjoint + at, states + at, dfeatures, sums + sums_stride * 1, products, dB_f + out,
            L, G, chunks, chunk, part, shares, feature_stride, program_stride, stride_xl, stride_xh, stride_Bfl,
            0, 0, HEADS, HAS_IDS, HAS_STATES, FOLDED, PACKED, PAIR, Q, ROWS, N, P, PRECISION, STAGES,
        )  # fmt: skip
    elif kind == 2:
        _half(
            dy, C_b + batch * stride_Cbb + group * stride_Cbg, decays, steps, totals, ids,
            states + at + state_stride, adjoint + at + state_stride, dfeatures, sums + sums_stride * 2,
            products + product_stride, dC_b + out,
            L, G, chunks, chunk, part, shares, feature_stride, program_stride, stride_yl, stride_yh, stride_Cbl,
            1, 1, HEADS, HAS_IDS, HAS_STATES, FOLDED, PACKED, PAIR, Q, ROWS, N, P, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _half(
            x, B_b + batch * stride_Bbb + group * stride_Bbg, decays, steps, totals, ids,
            adjoint + at + state_stride, states + at + state_stride, dfeatures, sums + sums_stride * 3,
            products + product_stride, dB_b + out,
            L, G, chunks, chunk, part, shares, feature_stride, program_stride, stride_xl, stride_xh, stride_Bbl,
            1, 0, HEADS, HAS_IDS, HAS_STATES, FOLDED, PACKED, PAIR, Q, ROWS, N, P, PRECISION, STAGES,
        )  # fmt: skip


@dataclass(frozen=True)
class FeatureGradsConfig:
    """Rows of a chunk that a program owns, warps and stages."""

    rows: int = 64
    warps: int = 4
    stages: int = 2


def feature_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    states: Tensor | None, adjoint: Tensor | None, tiles: TileSums, Q: int, config: FeatureGradsConfig, precision: str,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """([dB_f, dC_f, dB_b, dC_b], sums (4, B, H, L'), products 2^total <T, S> of each chunk (2, B, H, chunks)).

    sums: Rst and Cst, causal, then anticausal. What the states give is unwritten where there are no states.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    rows = min(config.rows, Q)
    dfeatures = tiles.dfeatures
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in features]
    sums = decays.sums.new_empty(4, batch, H, chunks * Q)
    products = decays.sums.new_empty(2, batch, H, chunks)
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _feature_grads_kernel[(batch * chunks * G * (Q // rows) * 4,)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps,
        decays.totals, x if ids is None else ids, x if states is None else states, x if adjoint is None else adjoint,
        dfeatures, sums, products, *grads, L, G, chunks, dfeatures.shape[0], sums.stride(0), products.stride(0),
        dfeatures.stride(1), dfeatures.stride(0), 0 if states is None else states.stride(0), *strides, HEADS=H // G,
        HAS_IDS=ids is not None, HAS_STATES=states is not None, FOLDED=decays.steps is None,
        PACKED=x.dtype == torch.bfloat16, PAIR=tiles.beside is not None, Q=Q, ROWS=rows, N=N, P=P, PRECISION=precision,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return grads, sums, products
