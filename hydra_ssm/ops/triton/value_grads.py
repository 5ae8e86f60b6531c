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
def _tile(
    values, dys, scores, dscores, column_f, column_b, dt_f, dt_b, decays, diagonals, i, j,
    FOLDED: tl.constexpr, PACKED: tl.constexpr, HAS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(M^T with the diagonal, dS^T, column sums f and b, row sums f and b) of one head's tile.

    On the diagonal the weight is no decay and may be infinite: what it spoils is replaced there, dS^T after the loop.
    """
    row_f, row_b, _, _ = load_decays(decays, i)
    lower = i[None, :] > j[:, None]
    upper = i[None, :] < j[:, None]
    equal = i[None, :] == j[:, None]
    dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
    weight = tl.exp2(tl.where(lower, row_f[None, :] - column_f[:, None], row_b[None, :] - column_b[:, None]))
    if not FOLDED:
        weight *= tl.where(lower, dt_f[:, None], dt_b[:, None])
    if PACKED:
        # In the products' own precision: a loop would keep the scores in float32 registers instead.
        matrix = weight.to(scores.dtype) * scores
        K = matrix.to(tl.float32) * dmatrix
    else:
        matrix = weight * scores.to(tl.float32)
        K = matrix * dmatrix
    dscores += weight * dmatrix
    K_f = tl.where(lower, K, 0.0)
    K_b = tl.where(upper, K, 0.0)
    if HAS_DIAGONAL:
        matrix = tl.where(equal, tl.load(diagonals + i).to(matrix.dtype)[None, :], matrix)
    else:
        matrix = tl.where(equal, 0.0, matrix)
    return matrix.to(dys.dtype), dscores, tl.sum(K_f, 1), tl.sum(K_b, 1), tl.sum(K_f, 0), tl.sum(K_b, 0)


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
    row_sums,
    column_sums,
    dfeatures,
    L,
    H,
    chunks,
    heads_per_group,
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
    BLOCKS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks (H / HEADS)); the tile Q x Q is taken in BLOCKS column blocks, 1, 2 or 4."""
    pid = tl.program_id(0).to(tl.int64)
    programs = H // HEADS
    head0 = pid % programs * HEADS
    chunk = pid // programs % chunks
    batch = pid // (programs * chunks)
    group = head0 // heads_per_group
    COLUMNS: tl.constexpr = Q // BLOCKS
    dtype: tl.constexpr = x.dtype.element_ty
    j = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (j < limit)[:, None]
    i = tl.arange(0, COLUMNS)
    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - 1) * stride_Cfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + 1) * stride_Cbl
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=inside, other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=inside, other=0.0)
    if HAS_IDS:
        ids += batch * L + begin
        id_j = tl.load(ids + j, mask=j < limit, other=-3)
        to_right = (id_j == tl.load(ids + tl.minimum(limit, Q) - 1)).to(tl.float32)
        to_left = (id_j == tl.load(ids)).to(tl.float32)
    scores = ()
    dscores = ()
    for q in tl.static_range(BLOCKS):
        column = i + q * COLUMNS
        in_f = (((column > 0) | (chunk > 0)) & (column < limit))[:, None]
        Cf = tl.load(C_f + column[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
        in_b = (column + 1 < limit)[:, None]
        Cb = tl.load(C_b + column[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
        f = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
        b = tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION)
        tile = tl.where(column[None, :] > j[:, None], f, b)
        tile = tl.where(column[None, :] == j[:, None], 0.0, tile)
        if HAS_IDS:
            tile = tl.where(id_j[:, None] == tl.load(ids + column, mask=column < limit, other=-3)[None, :], tile, 0.0)
        scores = scores + (tile.to(dtype),)
        dscores = dscores + (tl.zeros([Q, COLUMNS], tl.float32),)

    here = (batch * H + head0) * (chunks * Q) + chunk * Q
    decays += here * 4
    steps += here * 2
    diagonals += here
    row_sums += here * 2
    column_sums += here * 4
    totals += ((batch * H + head0) * chunks + chunk) * 2
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + j[:, None] * stride_xl + p[None, :]
    ys = dy + batch * stride_yb + head0 * stride_yh + begin * stride_yl + (i[:, None] * stride_yl + p[None, :])
    whole = dy + batch * stride_yb + head0 * stride_yh + begin * stride_yl + (j[:, None] * stride_yl + p[None, :])
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
        out = tl.zeros([Q, P], tl.float32)
        column_sum_f = tl.zeros([Q], tl.float32)
        column_sum_b = tl.zeros([Q], tl.float32)
        ddiagonal = tl.zeros([Q], tl.float32)
        more = ()
        for q in tl.static_range(BLOCKS):
            column = i + q * COLUMNS
            dys = tl.load(ys + (h * stride_yh + q * COLUMNS * stride_yl), mask=(column < limit)[:, None], other=0.0)
            matrix, tile, sum_f, sum_b, row_sum_f, row_sum_b = _tile(
                values, dys, scores[q], dscores[q], column_f, column_b, dt_f, dt_b, decays + at * 4, diagonals + at,
                column, j, FOLDED, PACKED, HAS_DIAGONAL, PRECISION,
            )  # fmt: skip
            out = tl.dot(matrix, dys, out, input_precision=PRECISION)
            more = more + (tile,)
            column_sum_f += sum_f
            column_sum_b += sum_b
            to = row_sums + (at + column)[:, None] * 2 + tl.arange(0, 2)[None, :]
            tl.store(to, tl.join(row_sum_f, row_sum_b))
            if HAS_DIAGONAL and BLOCKS == 1:
                ddiagonal = tl.sum(values.to(tl.float32) * dys.to(tl.float32), 1)
        dscores = more
        if HAS_DIAGONAL and BLOCKS > 1:
            dys = tl.load(whole + h * stride_yh, mask=inside, other=0.0)
            ddiagonal = tl.sum(values.to(tl.float32) * dys.to(tl.float32), 1)
        four = tl.join(tl.join(column_sum_f, ddiagonal), tl.join(column_sum_b, ddiagonal))
        to = column_sums + (at + j)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(to, tl.reshape(four, [Q, 4]))
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
    dC_f = dfeatures + feature_stride
    dC_b = dfeatures + feature_stride * 3
    for q in tl.static_range(BLOCKS):
        column = i + q * COLUMNS
        keep_f = column[None, :] > j[:, None]
        keep_b = column[None, :] < j[:, None]
        if HAS_IDS:
            same = id_j[:, None] == tl.load(ids + column, mask=column < limit, other=-3)[None, :]
            keep_f &= same
            keep_b &= same
        in_f = (((column > 0) | (chunk > 0)) & (column < limit))[:, None]
        Cf = tl.load(C_f + column[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
        in_b = (column + 1 < limit)[:, None]
        Cb = tl.load(C_b + column[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
        dB_f, dB_b = _to_features(
            dscores[q], keep_f, keep_b, Bf, Bb, Cf, Cb, dB_f, dB_b, dC_f, dC_b, column, n, N, PRECISION
        )
    tl.store(dfeatures + j[:, None] * N + n[None, :], dB_f)
    tl.store(dfeatures + feature_stride * 2 + j[:, None] * N + n[None, :], dB_b)


@dataclass(frozen=True)
class ValueGradsConfig:
    """Heads a program loops over, column blocks it takes its tile in, warps and stages."""

    heads: int = 12
    blocks: int = 2
    warps: int = 8
    stages: int = 2
    registers: int | None = None  # at most, a thread; None: what the compiler likes


def value_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    adjoint: Tensor | None, Q: int, config: ValueGradsConfig, precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, row sums, column sums, dfeatures): what the chunks' own tiles and the adjoint states give.

    Row sums (B, H, L', 2) of K, causal and anticausal; column sums (B, H, L', 4) likewise, then d diagonal (twice).
    dfeatures (programs, 4, B, G, L', N) float32: parts of dB_f, dC_f, dB_b, dC_b, dC in its rows' coordinates.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_sums = decays.sums.new_empty(batch, H, chunks * Q, 2)
    column_sums = torch.empty_like(decays.sums)
    dfeatures = decays.sums.new_empty(H // G // config.heads, 4, batch, G, chunks * Q, N)
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _value_grads_kernel[(batch * chunks * (H // config.heads),)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if adjoint is None else adjoint, dx, row_sums, column_sums, dfeatures, L, H, chunks, H // G,
        dfeatures.stride(1), dfeatures.stride(0), 0 if adjoint is None else adjoint.stride(0), *strides,
        HEADS=config.heads, BLOCKS=config.blocks, HAS_IDS=ids is not None, HAS_DIAGONAL=decays.diagonal is not None,
        HAS_STATES=adjoint is not None, FOLDED=decays.steps is None, PACKED=x.dtype == torch.bfloat16, Q=Q, N=N, P=P,
        PRECISION=precision, STAGES=config.stages, num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return dx, row_sums, column_sums, dfeatures
