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
    # C is of the rows (values dy, states S), B of the columns (x, T). Of the directions, C has the causal one first,
    # B the other, and what goes wholly through the chunk, 2^total <T, S>, is found for the one that is first.
    rows = kind == 0
    shift = ((kind - 1) * SHIFTED).to(tl.int32)
    first = batch * G * HEADS + head0
    decays += (first * chunks + chunk) * (Q * 4)
    steps += (first * chunks + chunk) * (Q * 8)
    totals += (first * chunks + chunk) * 2
    products += kind * product_stride + first * chunks + chunk
    sums += (first * chunks + chunk) * Q
    first_sums = sums + 3 * kind * sums_stride
    second_sums = sums + (2 - kind) * sums_stride
    through += ((batch * G + group) * held + place) * (Q * N)
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)

    dy += batch * stride_yb + head0 * stride_yh
    x += batch * stride_xb + head0 * stride_xh
    stride_vl = tl.where(rows, stride_yl, stride_xl)
    stride_vh = tl.where(rows, stride_yh, stride_xh)
    v = tl.where(rows, dy, x) + begin * stride_vl
    in_tile = i[:, None] * stride_vl + p[None, :]
    C_f += batch * stride_Cfb + group * stride_Cfg
    B_b += batch * stride_Bbb + group * stride_Bbg
    C_b += batch * stride_Cbb + group * stride_Cbg
    B_f += batch * stride_Bfb + group * stride_Bfg
    u = tl.where(rows, C_f, B_b)
    us = load_features(u, i, begin, limit, chunk, tl.where(rows, stride_Cfl, stride_Bbl), n, shift)
    u = tl.where(rows, C_b, B_f)
    other_us = load_features(u, i, begin, limit, chunk, tl.where(rows, stride_Cbl, stride_Bfl), n, -shift)
    at = ((batch * held + place) * G + group) * (HEADS * N * P)
    entry = n[:, None] * P + p[None, :]
    S = states + kind * state_stride
    T = adjoint + kind * adjoint_stride
    own = tl.where(rows, S, T) + at
    across = tl.where(rows, T, S) + at
    other = tl.where(rows, states + state_stride, adjoint) + at
    grad = tl.zeros([Q, N], tl.float32)
    other_grad = tl.zeros([Q, N], tl.float32)
    if HAS_IDS:
        ids += batch * L + begin
        id_ = tl.load(ids + i, mask=i < limit, other=-4)
        leftmost = tl.load(ids)
        rightmost = tl.load(ids + tl.minimum(limit, Q) - 1)
        left = tl.load(ids - 1, mask=chunk > 0, other=-2)
        right = tl.load(ids + Q, mask=limit > Q, other=-2)
        allowed = (id_ == tl.where(rows, left, leftmost)).to(tl.float32)
        other_allowed = (id_ == tl.where(rows, right, rightmost)).to(tl.float32)
        goes_through = tl.where(rows, left == rightmost, right == leftmost).to(tl.float32)
    for h in tl.range(0, heads if HEADS == 1 else HEADS, num_stages=STAGES):  # see tiles.py
        row_f, row_b, column_f, column_b = load_decays(decays + h * (chunks * Q * 4), i)
        total_f = tl.load(totals + h * chunks * 2)
        total_b = tl.load(totals + h * chunks * 2 + 1)
        if FOLDED:
            weight = tl.exp2(tl.where(rows, row_f, total_b - column_b))
            other_weight = tl.exp2(tl.where(rows, row_b, total_f - column_f))
        else:
            own_steps = steps + h * (chunks * Q * 8)
            weight_f, weight_b = load_weights(column_f, column_b, total_f, total_b, own_steps, i, FOLDED)
            weight = tl.where(rows, tl.exp2(row_f), weight_b)
            other_weight = tl.where(rows, tl.exp2(row_b), weight_f)
        g = tl.exp2(tl.where(rows, total_f, total_b))
        if HAS_IDS:
            weight *= allowed
            other_weight *= other_allowed
            g *= goes_through
        values = tl.load(v + h * stride_vh + in_tile, mask=(i < limit)[:, None], other=0.0)
        state = tl.load(own + h * (N * P) + entry)
        part, along = _through(values, state, us, weight, PACKED, PRECISION)
        grad += part
        tl.store(first_sums + h * (chunks * Q) + i, along)
        tl.store(products + h * chunks, g * tl.sum(_product(state, tl.load(across + h * (N * P) + entry), PACKED)))
        part, along = _through(values, tl.load(other + h * (N * P) + entry), other_us, other_weight, PACKED, PRECISION)
        other_grad += part
        tl.store(second_sums + h * (chunks * Q) + i, along)
    to = through + i[:, None] * N + n[None, :]
    tl.store(to + 3 * kind * through_stride, grad)
    tl.store(to + (2 - kind) * through_stride, other_grad)


@dataclass(frozen=True)
class FeatureGradsConfig:
    """Warps and stages."""

    warps: int = 4
    stages: int = 3


class StateSums(NamedTuple):
    """What the states give to dt and A, float32."""

    along: Tensor  # (4, B, H, L') Rst and Cst, causal, then anticausal
    products: Tensor  # (2, B, H, chunks) 2^total <T, S>

    @classmethod
    def of(cls, decays: Decays) -> StateSums:
        """Room for them."""
        new = decays.sums.new_empty
        return cls(new(4, *decays.sums.shape[:3]), new(2, *decays.totals.shape[:3]))

    def cut(self, rows: slice) -> StateSums:
        """Those of some rows of the batch."""
        return StateSums(self.along[:, rows], self.products[:, rows])


def feature_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    states: Tensor, adjoint: Tensor, sums: StateSums, Q: int, config: FeatureGradsConfig, precision: str,
    start: int = 0,
) -> Tensor:  # fmt: skip
    """(4, B, G, L', N) float32: what dC_f, dB_f, dC_b, dB_b get through the states S and their adjoint T.

    S and T are (2, B, chunks, H, N, P), of which the first stride may be any, of the chunks of Q tokens from `start`;
    L' are their tokens, B = 1 where these are not all. Parts of C are in the rows that read with it. Writes the sums.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    held = adjoint.shape[2]
    through = decays.sums.new_empty(4, batch, G, held * Q, N)
    along, products = sums
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _feature_grads_kernel[(batch * held * G * 2,)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        x if ids is None else ids, states, adjoint, through, along, products, L, G, cdiv(L, Q), start, held,
        through.stride(0), along.stride(0), products.stride(0), states.stride(0), adjoint.stride(0), *strides, H // G,
        SHIFTED=int(decays.shifted), HEADS=H // G, HAS_IDS=ids is not None, FOLDED=decays.steps is None,
        PACKED=x.dtype == torch.bfloat16, Q=Q, N=N, P=P, PRECISION=precision, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return through
