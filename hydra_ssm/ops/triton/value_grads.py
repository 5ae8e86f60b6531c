"""Gradients within chunks: of x and the diagonal, and of the scores, summed over the heads that share them.

Everything is transposed, tokens j that are read as rows and tokens i that read as columns, so that M^T is the left
operand of dx = M^T dy. A program loops over heads of one group with dS^T in registers; after the loop dS^T gives its
heads' part of dB and dC. Row and column sums of K = dM o M, per head, are what dt and A need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_steps


@triton.jit
def _scores(Bf, Bb, Cf, Cb, lower, equal, PRECISION: tl.constexpr):
    f = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
    b = tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION)
    return tl.where(equal, 0.0, tl.where(lower, f, b))


@triton.jit
def _tile(
    values, dys, scores, dscores, column_f, column_b, dt_f, dt_b, decays, diagonals, i, lower, equal,
    FOLDED: tl.constexpr, HAS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M^T with the diagonal, dS^T, column sums f and b, row sums f and b, d diagonal) of one head's tile."""
    row_f, row_b, _, _ = load_decays(decays, i)
    dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
    weight = tl.exp2(tl.where(lower, row_f[None, :] - column_f[:, None], row_b[None, :] - column_b[:, None]))
    if not FOLDED:
        weight *= tl.where(lower, dt_f[:, None], dt_b[:, None])
    weight = tl.where(equal, 0.0, weight)  # the exponent there is no decay and may overflow
    ddiagonal = tl.sum(tl.where(equal, dmatrix, 0.0), 1)
    matrix = weight * scores.to(tl.float32)
    dmatrix *= weight
    dscores += dmatrix
    dmatrix *= scores.to(tl.float32)
    K_f = tl.where(lower, dmatrix, 0.0)
    K_b = tl.where(lower, 0.0, dmatrix)
    if HAS_DIAGONAL:
        matrix = tl.where(equal, tl.load(diagonals + i)[None, :], matrix)
    matrix = matrix.to(dys.dtype)
    return matrix, dscores, tl.sum(K_f, 1), tl.sum(K_b, 1), tl.sum(K_f, 0), tl.sum(K_b, 0), ddiagonal


@triton.jit
def _to_features(
    dscores, keep_f, keep_b, Bf, Bb, Cf, Cb, dB_f, dB_b, dC_f, dC_b, i, n,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the tile's part of dB to the sums given, writes that of dC (rows i, in the rows' own coordinates)."""
    f = tl.where(keep_f, dscores, 0.0).to(Bf.dtype)
    b = tl.where(keep_b, dscores, 0.0).to(Bf.dtype)
    dB_f = tl.dot(f, Cf, dB_f, input_precision=PRECISION)
    dB_b = tl.dot(b, Cb, dB_b, input_precision=PRECISION)
    to = i[:, None] * N + n[None, :]
    tl.store(dC_f + to, tl.dot(tl.trans(f), Bf, input_precision=PRECISION))
    tl.store(dC_b + to, tl.dot(tl.trans(b), Bb, input_precision=PRECISION))
    return dB_f, dB_b


@triton.jit(do_not_specialize=["L", "chunks"])
def _value_grads_kernel(
    x,
    dy,
    B_f,
    C_f,
    B_b,
    C_b,
    decays,
    steps,
    totals,
    diagonals,
    ids,
    states,
    dx,
    ddiagonals,
    sums,
    dfeatures,
    L,
    H,
    chunks,
    heads_per_group,
    sums_stride,
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
    HALVES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks (H / HEADS)); the tile Q x Q is taken in HALVES column blocks, 1 or 2."""
    pid = tl.program_id(0).to(tl.int64)
    programs = H // HEADS
    head0 = pid % programs * HEADS
    chunk = pid // programs % chunks
    batch = pid // (programs * chunks)
    group = head0 // heads_per_group
    COLUMNS: tl.constexpr = Q // HALVES
    dtype: tl.constexpr = x.dtype.element_ty
    j = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (j < limit)[:, None]
    i0 = tl.arange(0, COLUMNS)
    i1 = i0 + (HALVES - 1) * COLUMNS
    lower0 = i0[None, :] > j[:, None]
    lower1 = i1[None, :] > j[:, None]
    equal0 = i0[None, :] == j[:, None]
    equal1 = i1[None, :] == j[:, None]

    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - 1) * stride_Cfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + 1) * stride_Cbl
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=inside, other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=inside, other=0.0)
    at_Cf0 = C_f + i0[:, None] * stride_Cfl + n[None, :]
    at_Cb0 = C_b + i0[:, None] * stride_Cbl + n[None, :]
    at_Cf1 = C_f + i1[:, None] * stride_Cfl + n[None, :]
    at_Cb1 = C_b + i1[:, None] * stride_Cbl + n[None, :]
    in_f0 = (((i0 > 0) | (chunk > 0)) & (i0 < limit))[:, None]
    in_b0 = (i0 + 1 < limit)[:, None]
    in_f1 = (((i1 > 0) | (chunk > 0)) & (i1 < limit))[:, None]
    in_b1 = (i1 + 1 < limit)[:, None]
    Cf = tl.load(at_Cf0, mask=in_f0, other=0.0)
    Cb = tl.load(at_Cb0, mask=in_b0, other=0.0)
    scores0 = _scores(Bf, Bb, Cf, Cb, lower0, equal0, PRECISION)
    if HALVES == 2:
        Cf = tl.load(at_Cf1, mask=in_f1, other=0.0)
        Cb = tl.load(at_Cb1, mask=in_b1, other=0.0)
        scores1 = _scores(Bf, Bb, Cf, Cb, lower1, equal1, PRECISION)
    if HAS_IDS:
        ids += batch * L + begin
        id_j = tl.load(ids + j, mask=j < limit, other=-3)
        to_right = (id_j == tl.load(ids + tl.minimum(limit, Q) - 1)).to(tl.float32)
        to_left = (id_j == tl.load(ids)).to(tl.float32)
        same0 = id_j[:, None] == tl.load(ids + i0, mask=i0 < limit, other=-3)[None, :]
        scores0 = tl.where(same0, scores0, 0.0)
        if HALVES == 2:
            same1 = id_j[:, None] == tl.load(ids + i1, mask=i1 < limit, other=-3)[None, :]
            scores1 = tl.where(same1, scores1, 0.0)
    scores0 = scores0.to(dtype)
    dscores0 = tl.zeros([Q, COLUMNS], tl.float32)
    if HALVES == 2:
        scores1 = scores1.to(dtype)
        dscores1 = tl.zeros([Q, COLUMNS], tl.float32)

    here = (batch * H + head0) * (chunks * Q) + chunk * Q
    decays += here * 4
    steps += here * 2
    diagonals += here
    ddiagonals += here
    sums += here
    totals += ((batch * H + head0) * chunks + chunk) * 2
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + j[:, None] * stride_xl + p[None, :]
    ys = dy + batch * stride_yb + head0 * stride_yh + begin * stride_yl + p[None, :]
    dxs = dx + ((batch * L + begin) * H + head0) * P + j[:, None] * (H * P) + p[None, :]
    state_f = states + ((batch * chunks + chunk) * H + head0) * (N * P) + n[:, None] * P + p[None, :]
    state_b = state_f + state_stride
    for h in tl.range(0, HEADS, num_stages=STAGES):
        at = h * (chunks * Q)
        _, _, column_f, column_b = load_decays(decays + at * 4, j)
        if FOLDED:
            dt_f = column_f
            dt_b = column_b
        else:
            dt_f, dt_b = load_steps(steps + at * 2, j)
        values = tl.load(xs + h * stride_xh, mask=inside, other=0.0)
        dys = tl.load(ys + h * stride_yh + i0[:, None] * stride_yl, mask=(i0 < limit)[:, None], other=0.0)
        matrix, dscores0, column_sum_f, column_sum_b, row_sum_f, row_sum_b, ddiagonal = _tile(
            values, dys, scores0, dscores0, column_f, column_b, dt_f, dt_b, decays + at * 4, diagonals + at,
            i0, lower0, equal0, FOLDED, HAS_DIAGONAL, PRECISION,
        )  # fmt: skip
        out = tl.dot(matrix, dys, input_precision=PRECISION)
        tl.store(sums + at + i0, row_sum_f)
        tl.store(sums + at + sums_stride * 2 + i0, row_sum_b)
        if HALVES == 2:
            dys = tl.load(ys + h * stride_yh + i1[:, None] * stride_yl, mask=(i1 < limit)[:, None], other=0.0)
            matrix, dscores1, more_f, more_b, row_sum_f, row_sum_b, more = _tile(
                values, dys, scores1, dscores1, column_f, column_b, dt_f, dt_b, decays + at * 4, diagonals + at,
                i1, lower1, equal1, FOLDED, HAS_DIAGONAL, PRECISION,
            )  # fmt: skip
            out = tl.dot(matrix, dys, out, input_precision=PRECISION)
            column_sum_f += more_f
            column_sum_b += more_b
            ddiagonal += more
            tl.store(sums + at + i1, row_sum_f)
            tl.store(sums + at + sums_stride * 2 + i1, row_sum_b)
        tl.store(sums + at + sums_stride + j, column_sum_f)
        tl.store(sums + at + sums_stride * 3 + j, column_sum_b)
        if HAS_DIAGONAL:
            tl.store(ddiagonals + at + j, ddiagonal)
        if HAS_STATES:
            to_f = tl.exp2(tl.load(totals + h * chunks * 2) - column_f)
            to_b = tl.exp2(tl.load(totals + h * chunks * 2 + 1) - column_b)
            if not FOLDED:
                to_f *= dt_f
                to_b *= dt_b
            if HAS_IDS:
                to_f *= to_right
                to_b *= to_left
            out += tl.dot(Bf, tl.load(state_f + h * (N * P)), input_precision=PRECISION) * to_f[:, None]
            out += tl.dot(Bb, tl.load(state_b + h * (N * P)), input_precision=PRECISION) * to_b[:, None]
        tl.store(dxs + h * P, out.to(dtype), mask=inside)

    # dfeatures (programs of a group, 4, B, G, L', N): dB_f, dC_f, dB_b, dC_b, dC where its row stands
    groups = H // heads_per_group
    share = (head0 % heads_per_group) // HEADS
    dfeatures += share * program_stride + ((batch * groups + group) * chunks + chunk) * (Q * N)
    dB_f = tl.zeros([Q, N], tl.float32)
    dB_b = tl.zeros([Q, N], tl.float32)
    keep_f = lower0
    keep_b = i0[None, :] < j[:, None]
    if HAS_IDS:
        keep_f &= same0
        keep_b &= same0
    Cf = tl.load(at_Cf0, mask=in_f0, other=0.0)
    Cb = tl.load(at_Cb0, mask=in_b0, other=0.0)
    dC_f = dfeatures + feature_stride
    dC_b = dfeatures + feature_stride * 3
    dB_f, dB_b = _to_features(dscores0, keep_f, keep_b, Bf, Bb, Cf, Cb, dB_f, dB_b, dC_f, dC_b, i0, n, N, PRECISION)
    if HALVES == 2:
        keep_f = lower1
        keep_b = i1[None, :] < j[:, None]
        if HAS_IDS:
            keep_f &= same1
            keep_b &= same1
        Cf = tl.load(at_Cf1, mask=in_f1, other=0.0)
        Cb = tl.load(at_Cb1, mask=in_b1, other=0.0)
        dB_f, dB_b = _to_features(dscores1, keep_f, keep_b, Bf, Bb, Cf, Cb, dB_f, dB_b, dC_f, dC_b, i1, n, N, PRECISION)
    tl.store(dfeatures + j[:, None] * N + n[None, :], dB_f)
    tl.store(dfeatures + feature_stride * 2 + j[:, None] * N + n[None, :], dB_b)


@dataclass(frozen=True)
class ValueGradsConfig:
    """Heads a program loops over, column blocks it takes its tile in, warps and stages."""

    heads: int = 12
    halves: int = 2
    warps: int = 8
    stages: int = 2


def value_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    adjoint: Tensor | None, Q: int, config: ValueGradsConfig, precision: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(dx, d diagonal (B, H, L') or None, sums, dfeatures): what the chunks' own tiles and the adjoint states give.

    sums (4, B, H, L'): row sums and column sums of K, causal, then the same anticausal. dfeatures
    (programs, 4, B, G, L', N) float32: parts of dB_f, dC_f, dB_b, dC_b, dC in its rows' coordinates.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddiagonal = None if decays.diagonal is None else torch.empty_like(decays.diagonal)
    sums = decays.sums.new_empty(4, batch, H, chunks * Q)
    dfeatures = decays.sums.new_empty(H // G // config.heads, 4, batch, G, chunks * Q, N)
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _value_grads_kernel[(batch * chunks * (H // config.heads),)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if adjoint is None else adjoint, dx, sums if ddiagonal is None else ddiagonal, sums, dfeatures, L, H, chunks,
        H // G, sums.stride(0), dfeatures.stride(1), dfeatures.stride(0), 0 if adjoint is None else adjoint.stride(0),
        *strides, HEADS=config.heads, HALVES=config.halves, HAS_IDS=ids is not None,
        HAS_DIAGONAL=ddiagonal is not None, HAS_STATES=adjoint is not None, FOLDED=decays.steps is None, Q=Q, N=N, P=P,
        PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, ddiagonal, sums, dfeatures
