"""Gradients within chunks: of x and the diagonal, and of the scores, summed over the heads that share them.

Everything is transposed, tokens j that are read as rows and tokens i that read as columns, so that M^T is the left
operand of dx = M^T dy. A program owns ROWS tokens j of a chunk and loops over heads of one group with dS^T in
registers; after the loop dS^T gives its heads' part of dB and dC. A chunk of 2 ROWS tokens has two programs: each has
the block on the diagonal, where both directions meet, and the block beside it, which has one direction and no mask.
Row and column sums of K = dM o M, per head, are what dt and A need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_steps


@triton.jit
def _entries(weight, scores, dmatrix, PACKED: tl.constexpr):
    """(M, K) of a block."""
    if PACKED:
        # In the products' own precision: a loop would keep the scores in float32 registers instead.
        matrix = weight.to(scores.dtype) * scores
        K = matrix.to(tl.float32) * dmatrix
    else:
        matrix = weight * scores.to(tl.float32)
        K = matrix * dmatrix
    return matrix, K


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
    adjoint,
    dx,
    ddiagonals,
    row_sums,
    other_sums,
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
    PAIR: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks (H / HEADS) (1 + PAIR))."""
    Q: tl.constexpr = ROWS * (1 + PAIR)
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % (1 + PAIR)).to(tl.int32)
    pid = pid // (1 + PAIR)
    programs = H // HEADS
    head0 = pid % programs * HEADS
    chunk = pid // programs % chunks
    batch = pid // (programs * chunks)
    group = head0 // heads_per_group
    dtype: tl.constexpr = x.dtype.element_ty
    r = tl.arange(0, ROWS)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    j = r + part * ROWS
    o = r + (1 - part) * ROWS  # the other half of the chunk
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (j < limit)[:, None]
    in_f = (((j > 0) | (chunk > 0)) & (j < limit))[:, None]
    in_b = (j + 1 < limit)[:, None]
    lower = r[None, :] > r[:, None]
    upper = r[None, :] < r[:, None]
    equal = r[None, :] == r[:, None]

    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - 1) * stride_Cfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + 1) * stride_Cbl
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=inside, other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=inside, other=0.0)
    Cf = tl.load(C_f + j[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
    Cb = tl.load(C_b + j[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
    scores_f = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
    scores_b = tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION)
    scores = tl.where(lower, scores_f, tl.where(upper, scores_b, 0.0))
    if PAIR:
        # The first half is read by later tokens, the second by earlier ones.
        in_other = ((o < limit) & (part == 0))[:, None]
        Cf = tl.load(C_f + o[:, None] * stride_Cfl + n[None, :], mask=in_other, other=0.0)
        in_other = ((o + 1 < limit) & (part == 1))[:, None]
        Cb = tl.load(C_b + o[:, None] * stride_Cbl + n[None, :], mask=in_other, other=0.0)
        beside = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
        beside = tl.dot(Bb, tl.trans(Cb), beside, input_precision=PRECISION)
    if HAS_IDS:
        ids += batch * L + begin
        id_j = tl.load(ids + j, mask=j < limit, other=-3)
        to_right = (id_j == tl.load(ids + tl.minimum(limit, Q) - 1)).to(tl.float32)
        to_left = (id_j == tl.load(ids)).to(tl.float32)
        scores = tl.where(id_j[:, None] == id_j[None, :], scores, 0.0)
        if PAIR:
            same = id_j[:, None] == tl.load(ids + o, mask=o < limit, other=-3)[None, :]
            beside = tl.where(same, beside, 0.0)
    scores = scores.to(dtype)
    dscores = tl.zeros([ROWS, ROWS], tl.float32)
    if PAIR:
        beside = beside.to(dtype)
        dbeside = tl.zeros([ROWS, ROWS], tl.float32)

    here = (batch * H + head0) * (chunks * Q) + begin
    decays += here * 4
    steps += here * 2
    diagonals += here
    ddiagonals += here
    row_sums += here * 2
    other_sums += here
    column_sums += here * 2
    totals += ((batch * H + head0) * chunks + chunk) * 2
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + (j[:, None] * stride_xl + p[None, :])
    dy += batch * stride_yb + head0 * stride_yh + begin * stride_yl
    ys = dy + (j[:, None] * stride_yl + p[None, :])
    other_ys = dy + (o[:, None] * stride_yl + p[None, :])
    dxs = dx + ((batch * L + begin) * H + head0) * P + (j[:, None] * (H * P) + p[None, :])
    entry = ((batch * chunks + chunk) * H + head0) * (N * P) + (n[:, None] * P + p[None, :])
    for h in tl.range(0, HEADS, num_stages=STAGES):
        at = h * (chunks * Q)
        row_f, row_b, column_f, column_b = load_decays(decays + at * 4, j)
        values = tl.load(xs + h * stride_xh, mask=inside, other=0.0)
        dys = tl.load(ys + h * stride_yh, mask=inside, other=0.0)
        dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
        weight = tl.exp2(tl.where(lower, row_f[None, :] - column_f[:, None], row_b[None, :] - column_b[:, None]))
        if not FOLDED:
            dt_f, dt_b = load_steps(steps + at * 2, j)
            weight *= tl.where(lower, dt_f[:, None], dt_b[:, None])
        # On the diagonal the weight is no decay and may be infinite: what it spoils there is replaced.
        matrix, K = _entries(weight, scores, dmatrix, PACKED)
        dscores += weight * dmatrix
        K_f = tl.where(lower, K, 0.0)
        K_b = tl.where(upper, K, 0.0)
        to = row_sums + (at + j)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(to, tl.join(tl.sum(K_f, 0), tl.sum(K_b, 0)))
        column_sum_f = tl.sum(K_f, 1)
        column_sum_b = tl.sum(K_b, 1)
        if HAS_DIAGONAL:
            matrix = tl.where(equal, tl.load(diagonals + at + j).to(matrix.dtype)[None, :], matrix)
            if FOLDED:
                ddiagonal = tl.sum(tl.where(equal, dmatrix, 0.0), 1)
            else:  # more exact, and slower
                ddiagonal = tl.sum(values.to(tl.float32) * dys.to(tl.float32), 1)
            tl.store(ddiagonals + at + j, ddiagonal)
        else:
            matrix = tl.where(equal, 0.0, matrix)
        out = tl.dot(matrix.to(dtype), dys, input_precision=PRECISION)
        if PAIR:
            other_f, other_b, _, _ = load_decays(decays + at * 4, o)
            dys = tl.load(other_ys + h * stride_yh, mask=(o < limit)[:, None], other=0.0)
            dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
            other_row = tl.where(part == 0, other_f, other_b)
            weight = tl.exp2(other_row[None, :] - tl.where(part == 0, column_f, column_b)[:, None])
            if not FOLDED:
                weight *= tl.where(part == 0, dt_f, dt_b)[:, None]
            matrix, K = _entries(weight, beside, dmatrix, PACKED)
            dbeside += weight * dmatrix
            tl.store(other_sums + at + o, tl.sum(K, 0))
            more = tl.sum(K, 1)
            column_sum_f += tl.where(part == 0, more, 0.0)
            column_sum_b += tl.where(part == 0, 0.0, more)
            out = tl.dot(matrix.to(dtype), dys, out, input_precision=PRECISION)
        to = column_sums + (at + j)[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(to, tl.join(column_sum_f, column_sum_b))
        if HAS_STATES:
            to_f = tl.exp2(tl.load(totals + h * chunks * 2) - column_f)
            to_b = tl.exp2(tl.load(totals + h * chunks * 2 + 1) - column_b)
            if not FOLDED:
                to_f *= dt_f
                to_b *= dt_b
            if HAS_IDS:
                to_f *= to_right
                to_b *= to_left
            T = tl.load(adjoint + entry + h * (N * P))
            out += tl.dot(Bf, T, input_precision=PRECISION) * to_f[:, None]
            T = tl.load(adjoint + entry + (h * (N * P) + state_stride))
            out += tl.dot(Bb, T, input_precision=PRECISION) * to_b[:, None]
        tl.store(dxs + h * P, out.to(dtype), mask=inside)

    # dfeatures (programs of a group, 5, B, G, L', N): dB_f, dC_f, dB_b, dC_b of the blocks on the diagonal (dB of the
    # blocks beside it too), and dC of the blocks beside it: causal in a chunk's second half, anticausal in its first.
    groups = H // heads_per_group
    share = (head0 % heads_per_group) // HEADS
    dfeatures += share * program_stride + ((batch * groups + group) * chunks + chunk) * (Q * N)
    to = j[:, None] * N + n[None, :]
    keep_f = lower
    keep_b = upper
    if HAS_IDS:
        keep_f &= id_j[:, None] == id_j[None, :]
        keep_b &= id_j[:, None] == id_j[None, :]
    Cf = tl.load(C_f + j[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
    f = tl.where(keep_f, dscores, 0.0).to(dtype)
    tl.store(dfeatures + feature_stride + to, tl.dot(tl.trans(f), Bf, input_precision=PRECISION))
    dB_f = tl.dot(f, Cf, input_precision=PRECISION)
    Cb = tl.load(C_b + j[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
    b = tl.where(keep_b, dscores, 0.0).to(dtype)
    tl.store(dfeatures + feature_stride * 3 + to, tl.dot(tl.trans(b), Bb, input_precision=PRECISION))
    dB_b = tl.dot(b, Cb, input_precision=PRECISION)
    if PAIR:
        if HAS_IDS:
            dbeside = tl.where(id_j[:, None] == tl.load(ids + o, mask=o < limit, other=-3)[None, :], dbeside, 0.0)
        f = tl.where(part == 0, dbeside, 0.0).to(dtype)
        b = tl.where(part == 0, 0.0, dbeside).to(dtype)
        Cf = tl.load(C_f + o[:, None] * stride_Cfl + n[None, :], mask=((o < limit) & (part == 0))[:, None], other=0.0)
        Cb = tl.load(C_b + o[:, None] * stride_Cbl + n[None, :], mask=(o + 1 < limit)[:, None], other=0.0)
        dB_f = tl.dot(f, Cf, dB_f, input_precision=PRECISION)
        dB_b = tl.dot(b, Cb, dB_b, input_precision=PRECISION)
        dC = tl.dot(tl.trans(f), Bf, input_precision=PRECISION)
        dC = tl.dot(tl.trans(b), Bb, dC, input_precision=PRECISION)
        tl.store(dfeatures + feature_stride * 4 + o[:, None] * N + n[None, :], dC)
    tl.store(dfeatures + to, dB_f)
    tl.store(dfeatures + feature_stride * 2 + to, dB_b)


@dataclass(frozen=True)
class ValueGradsConfig:
    """Heads a program loops over, whether a chunk has two programs, warps and stages."""

    heads: int = 24
    pair: bool = True
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class TileSums:
    """What dt, A and the diagonal need of the chunks, float32, and the parts of dB and dC."""

    rows: Tensor  # (B, H, L', 2) row sums of K in the blocks on the diagonal, causal and anticausal
    beside: (
        Tensor | None
    )  # (B, H, L') in the blocks beside it: causal in a chunk's second half, anticausal in its first
    columns: Tensor  # (B, H, L', 2) column sums of K, causal and anticausal
    diagonal: Tensor | None  # (B, H, L') gradient of the diagonal
    dfeatures: Tensor  # (programs, 5, B, G, L', N) dB_f, dC_f, dB_b, dC_b, dC beside, dC in its rows' coordinates


def value_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    adjoint: Tensor | None, Q: int, config: ValueGradsConfig, precision: str,
) -> tuple[Tensor, TileSums]:  # fmt: skip
    """dx, from the chunks' own entries and the adjoint states, and the sums."""
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    parts = 2 if config.pair else 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = decays.sums.new_empty
    sums = TileSums(
        new(batch, H, chunks * Q, 2),
        new(batch, H, chunks * Q) if config.pair else None,
        new(batch, H, chunks * Q, 2),
        None if decays.diagonal is None else torch.empty_like(decays.diagonal),
        new(H // G // config.heads, 5, batch, G, chunks * Q, N),
    )
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _value_grads_kernel[(batch * chunks * (H // config.heads) * parts,)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if adjoint is None else adjoint, dx, sums.rows if sums.diagonal is None else sums.diagonal, sums.rows,
        sums.rows if sums.beside is None else sums.beside, sums.columns, sums.dfeatures, L, H, chunks, H // G,
        sums.dfeatures.stride(1), sums.dfeatures.stride(0), 0 if adjoint is None else adjoint.stride(0), *strides,
        HEADS=config.heads, PAIR=config.pair, HAS_IDS=ids is not None, HAS_DIAGONAL=decays.diagonal is not None,
        HAS_STATES=adjoint is not None, FOLDED=decays.steps is None, PACKED=x.dtype == torch.bfloat16,
        ROWS=Q // parts, N=N, P=P, PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, sums
