"""Gradients of B and C through the states, and what dt and A need of the states.

Per direction, with S entering the chunk that is read and T its adjoint coming the other way:

    dC = (the chunk's part) + sum_h 2^row dy S^T                       Rst_i = (2^row dy S^T)_i . C_i
    dB = (the chunk's part) + sum_h dt 2^(total - column) x T^T        Cst_j = (dt 2^(total - column) x T^T)_j . B_j
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_weights
from .sizes import cdiv
from .tiles import load_features


@triton.jit
def _product(a, b, PACKED: tl.constexpr):
    """a b, elementwise, in float32; PACKED: rounded as a and b are, in half the registers."""
    if PACKED:
        return (a * b).to(tl.float32)
    return a.to(tl.float32) * b.to(tl.float32)


@triton.jit
def _through(values, state, us, weight, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """What a head gives to the features' gradient through a state, and row by row its product with them."""
    part = tl.dot(values, tl.trans(state), input_precision=PRECISION) * weight[:, None]
    if PACKED:
        # In the products' own precision: a loop would keep the features in float32 registers instead.
        return part, tl.sum(_product(part.to(us.dtype), us, PACKED), 1)
    return part, tl.sum(_product(part, us, PACKED), 1)


@triton.jit
def _part(
    v,
    u_f,
    u_b,
    decays,
    steps,
    totals,
    ids,
    states,
    other_states,
    through,
    sums,
    products,
    L,
    chunks,
    chunk,
    held,
    through_stride,
    sums_stride,
    product_stride,
    state_stride,
    other_stride,
    stride_vl,
    stride_vh,
    stride_fl,
    stride_bl,
    heads,
    READS: tl.constexpr,
    NEIGHBOUR: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """C of both directions (READS: u = C, v = dy, states = S) or B (u = B, v = x, states = T)."""
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    us_f = load_features(u_f, i, begin, limit, chunk, stride_fl, n, 0, NEIGHBOUR)
    us_b = load_features(u_b, i, begin, limit, chunk, stride_bl, n, 1, NEIGHBOUR)
    grad_f = tl.zeros([Q, N], tl.float32)
    grad_b = tl.zeros([Q, N], tl.float32)
    if HAS_IDS:
        ids += begin
        id_ = tl.load(ids + i, mask=i < limit, other=-4)
        first = tl.load(ids)
        last = tl.load(ids + tl.minimum(limit, Q) - 1)
        left = tl.load(ids - 1, mask=chunk > 0, other=-2)
        right = tl.load(ids + Q, mask=limit > Q, other=-2)
        allowed_f = (id_ == (left if READS else last)).to(tl.float32)
        allowed_b = (id_ == (right if READS else first)).to(tl.float32)
    vs = v + begin * stride_vl + (i[:, None] * stride_vl + p[None, :])
    entry = n[:, None] * P + p[None, :]
    for h in tl.range(0, heads if HEADS == 1 else HEADS, num_stages=STAGES):  # see tiles.py
        row_f, row_b, column_f, column_b = load_decays(decays + h * (chunks * Q * 4), i)
        total_f = tl.load(totals + h * chunks * 2)
        total_b = tl.load(totals + h * chunks * 2 + 1)
        if READS:
            weight_f = tl.exp2(row_f)
            weight_b = tl.exp2(row_b)
        else:
            at = steps + h * (chunks * Q * 8)
            weight_f, weight_b = load_weights(column_f, column_b, total_f, total_b, at, i, FOLDED)
        if HAS_IDS:
            weight_f *= allowed_f
            weight_b *= allowed_b
        values = tl.load(vs + h * stride_vh, mask=(i < limit)[:, None], other=0.0)
        state_f = tl.load(states + h * (N * P) + entry)
        part, along = _through(values, state_f, us_f, weight_f, PACKED, PRECISION)
        grad_f += part
        tl.store(sums + h * (held * Q) + i, along)
        state_b = tl.load(states + (h * (N * P) + state_stride) + entry)
        part, along = _through(values, state_b, us_b, weight_b, PACKED, PRECISION)
        grad_b += part
        tl.store(sums + 2 * sums_stride + h * (held * Q) + i, along)
        # 2^total <T, S>: the causal one here, the anticausal one where B is.
        if READS:
            other = tl.load(other_states + h * (N * P) + entry)
            g = tl.exp2(total_f)
            if HAS_IDS:
                g *= (left == last).to(tl.float32)
            product = _product(state_f, other, PACKED)
        else:
            other = tl.load(other_states + (h * (N * P) + other_stride) + entry)
            g = tl.exp2(total_b)
            if HAS_IDS:
                g *= (right == first).to(tl.float32)
            product = _product(state_b, other, PACKED)
        tl.store(products + (1 - READS) * product_stride + h * held, g * tl.sum(product))
    to = through + i[:, None] * N + n[None, :]
    tl.store(to, grad_f)
    tl.store(to + 2 * through_stride, grad_b)


@triton.jit(do_not_specialize=["L", "chunks", "start", "held", "G", "heads"])
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
    through,
    sums,
    products,
    L,
    G,
    chunks,
    start,
    held,
    through_stride,
    sums_stride,
    product_stride,
    state_stride,
    adjoint_stride,
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
    heads,
    SHIFTED: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B held G, C or B), of the chunks `held` from `start`; HEADS are all of a group."""
    pid = tl.program_id(0).to(tl.int64)
    kind = pid % 2
    group = pid // 2 % G
    place = pid // (2 * G) % held
    chunk = start + place
    batch = pid // (2 * G * held)
    head0 = group * HEADS
    first = batch * G * HEADS + head0
    decays += (first * chunks + chunk) * (Q * 4)
    steps += (first * chunks + chunk) * (Q * 8)
    totals += (first * chunks + chunk) * 2
    sums += (first * held + place) * Q + kind * sums_stride
    products += first * held + place
    ids += batch * L
    at = ((batch * held + place) * G + group) * (HEADS * N * P)
    states += at
    adjoint += at
    through += ((batch * G + group) * held + place) * (Q * N) + kind * through_stride
    if kind == 0:
        _part(
            dy + batch * stride_yb + head0 * stride_yh, C_f + batch * stride_Cfb + group * stride_Cfg,
            C_b + batch * stride_Cbb + group * stride_Cbg, decays, steps, totals, ids, states, adjoint, through, sums,
            products, L, chunks, chunk, held, through_stride, sums_stride, product_stride, state_stride, adjoint_stride,
            stride_yl, stride_yh, stride_Cfl, stride_Cbl, heads, 1, SHIFTED, HEADS, HAS_IDS, FOLDED, PACKED, Q, N, P,
            PRECISION, STAGES,
        )  # fmt: skip
    else:
        _part(
            x + batch * stride_xb + head0 * stride_xh, B_f + batch * stride_Bfb + group * stride_Bfg,
            B_b + batch * stride_Bbb + group * stride_Bbg, decays, steps, totals, ids, adjoint, states, through, sums,
            products, L, chunks, chunk, held, through_stride, sums_stride, product_stride, adjoint_stride, state_stride,
            stride_xl, stride_xh, stride_Bfl, stride_Bbl, heads, 0, 0, HEADS, HAS_IDS, FOLDED, PACKED, Q, N, P,
            PRECISION, STAGES,
        )  # fmt: skip


@dataclass(frozen=True)
class FeatureGradsConfig:
    """Warps and stages."""

    warps: int = 4
    stages: int = 3


class StateGrads(NamedTuple):
    """What the states give to B, C, dt and A, float32, of L' tokens in so many chunks."""

    through: Tensor  # (4, B, G, L', N) parts of dC_f, dB_f, dC_b, dB_b, those of C in the rows that read with it
    sums: Tensor  # (4, B, H, L') Rst and Cst, causal, then anticausal
    products: Tensor  # (2, B, H, chunks) 2^total <T, S>


def feature_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    states: Tensor, adjoint: Tensor, Q: int, config: FeatureGradsConfig, precision: str, start: int = 0,
) -> StateGrads:  # fmt: skip
    """The gradients through the states S and their adjoint T of the chunks (of Q tokens) from `start` that T is of.

    S and T are (2, B, chunks, H, N, P), of which the first stride may be any; B = 1 if these are not all chunks.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    held = adjoint.shape[2]
    new = decays.sums.new_empty
    found = StateGrads(new(4, batch, G, held * Q, N), new(4, batch, H, held * Q), new(2, batch, H, held))
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _feature_grads_kernel[(batch * held * G * 2,)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        x if ids is None else ids, states, adjoint, found.through, found.sums, found.products, L, G, cdiv(L, Q), start,
        held, found.through.stride(0), found.sums.stride(0), found.products.stride(0), states.stride(0),
        adjoint.stride(0), *strides, H // G, SHIFTED=int(decays.shifted), HEADS=H // G,
        HAS_IDS=ids is not None, FOLDED=decays.steps is None,
        PACKED=x.dtype == torch.bfloat16, Q=Q, N=N, P=P, PRECISION=precision, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return found
