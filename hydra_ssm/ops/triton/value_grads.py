"""Gradients within chunks: of x and the diagonal, and of the scores, summed over the heads that share them.

Everything is transposed, tokens j that are read as rows and tokens i that read as columns, so that M^T is the left
operand of dx = M^T dy. A program owns a tile of tokens j and loops over the heads of a group with dS^T in registers;
after the loop dS^T gives the tile's part of dB and dC, and the states' part is added. Row and column sums of
K = dM o M, per head, are what dt and A need; float32 keeps apart what neighbours give, of which nothing decays.

A chunk is one tile. Only where one chunk is the whole sequence may it have two (a pair): each has the block on the
diagonal, where both directions meet, and the block beside it, which has one direction and no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_rests, load_steps, load_weights
from .sizes import cdiv, next_power_of_2


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


@triton.jit(do_not_specialize=["L", "G", "chunks", "start", "held", "heads"])
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
    through,
    projected,
    projection,
    dx,
    ddiagonals,
    tiles,
    other_sums,
    nears,
    beside,
    dB_f,
    dC_f,
    dB_b,
    dC_b,
    L,
    G,
    chunks,
    start,
    held,
    state_stride,
    through_stride,
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
    stride_dxb,
    stride_dxl,
    stride_dxh,
    stride_db,
    stride_dl,
    stride_dg,
    heads,
    PAIR: tl.constexpr,
    SHIFTED: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B held G tiles), of the chunks `held` from `start`; HEADS are all of a group.

    What a program writes of x, B and C no other reads: gradients may take their places. It has read them before.
    """
    Q: tl.constexpr = ROWS * (1 + PAIR)
    NEAR: tl.constexpr = SHIFTED * (1 - FOLDED)  # neighbours' entries apart; but for the one between a pair's tiles
    dtype: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % (1 + PAIR)).to(tl.int32)
    pid = pid // (1 + PAIR)
    group = pid % G
    held_at = pid // G % held
    chunk = start + held_at
    batch = pid // (G * held)
    head0 = group * HEADS
    r = tl.arange(0, ROWS)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    j = r + part * ROWS
    o = r + (1 - part) * ROWS  # the other tile of a pair
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (j < limit)[:, None]
    in_f = (((j > 0) | (chunk > 0) | (SHIFTED == 0)) & (j < limit))[:, None]
    in_b = (j + SHIFTED < limit)[:, None]
    lower = r[None, :] > r[:, None]
    upper = r[None, :] < r[:, None]
    equal = r[None, :] == r[:, None]

    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - SHIFTED) * stride_Cfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + SHIFTED) * stride_Cbl
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=inside, other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=inside, other=0.0)
    Cf = tl.load(C_f + j[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
    Cb = tl.load(C_b + j[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
    scores_f = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
    scores_b = tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION)
    scores = tl.where(lower, scores_f, tl.where(upper, scores_b, 0.0))
    if PAIR:
        # The first tile is read by later tokens, the second by earlier ones.
        other_f = ((o < limit) & (part == 0))[:, None]
        other_b = ((o + SHIFTED < limit) & (part == 1))[:, None]
        Cf = tl.load(C_f + o[:, None] * stride_Cfl + n[None, :], mask=other_f, other=0.0)
        Cb = tl.load(C_b + o[:, None] * stride_Cbl + n[None, :], mask=other_b, other=0.0)
        across = tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION)
        across = tl.dot(Bb, tl.trans(Cb), across, input_precision=PRECISION)
    if HAS_IDS:
        ids += batch * L + begin
        id_j = tl.load(ids + j, mask=j < limit, other=-3)
        to_right = (id_j == tl.load(ids + tl.minimum(limit, Q) - 1)).to(tl.float32)
        to_left = (id_j == tl.load(ids)).to(tl.float32)
        scores = tl.where(id_j[:, None] == id_j[None, :], scores, 0.0)
        if PAIR:
            same = id_j[:, None] == tl.load(ids + o, mask=o < limit, other=-3)[None, :]
            across = tl.where(same, across, 0.0)
    scores = scores.to(dtype)
    dscores = tl.zeros([ROWS, ROWS], tl.float32)
    if PAIR:
        across = across.to(dtype)
        dacross = tl.zeros([ROWS, ROWS], tl.float32)

    first = batch * G * HEADS + head0
    here = (first * chunks + chunk) * Q
    decays += here * 4
    steps += here * 8
    diagonals += here
    ddiagonals += here
    tiles += here * 4
    other_sums += here
    nears += here * 2
    totals += (first * chunks + chunk) * 2
    adjoint += ((batch * held + held_at) * G + group) * (HEADS * N * P)
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + (j[:, None] * stride_xl + p[None, :])
    dy += batch * stride_yb + head0 * stride_yh + begin * stride_yl
    ys = dy + (j[:, None] * stride_yl + p[None, :])
    other_ys = dy + (o[:, None] * stride_yl + p[None, :])
    dxs = dx + batch * stride_dxb + head0 * stride_dxh + begin * stride_dxl + (j[:, None] * stride_dxl + p[None, :])
    entry = n[:, None] * P + p[None, :]
    if ALL_HEADS:
        a = tl.arange(0, ALL_HEADS)
        H = G * HEADS
        has_head = a < H
        heads_of = projected + (batch * L + begin) * H + (j[:, None] * H + a[None, :])
        back = tl.load(heads_of, mask=inside & has_head[None, :], other=0.0)
        projection += head0 * P + (a[:, None] * (H * P) + p[None, :])
    for h in tl.range(0, heads if HEADS == 1 else HEADS, num_stages=STAGES):  # see tiles.py
        at = h * (chunks * Q)
        row_f, row_b, column_f, column_b = load_decays(decays + at * 4, j)
        values = tl.load(xs + h * stride_xh, mask=inside, other=0.0)
        dys = tl.load(ys + h * stride_yh, mask=inside, other=0.0)
        dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
        exponent = tl.where(lower, row_f[None, :] - column_f[:, None], row_b[None, :] - column_b[:, None])
        if not FOLDED:
            rest_f, rest_b, less_f, less_b = load_rests(steps + at * 8, j)
            exponent += tl.where(lower, rest_f[None, :] - less_f[:, None], rest_b[None, :] - less_b[:, None])
        weight = tl.exp2(exponent)
        if not FOLDED:
            dt_f, dt_b = load_steps(steps + at * 8, j)
            weight *= tl.where(lower, dt_f[:, None], dt_b[:, None])
        # On the diagonal the weight is no decay and may be infinite: what it spoils there is replaced.
        matrix, K = _entries(weight, scores, dmatrix, PACKED)
        dscores += weight * dmatrix
        pair = j[:, None] + tl.arange(0, 2)[None, :] * Q
        if NEAR:
            next_f = r[None, :] == r[:, None] + 1
            next_b = r[None, :] == r[:, None] - 1
            near_f = tl.sum(tl.where(next_f, K, 0.0), 1)
            tl.store(nears + at * 2 + pair, tl.join(near_f, tl.sum(tl.where(next_b, K, 0.0), 1)))
            K = tl.where(next_f | next_b, 0.0, K)
        K_f = tl.where(lower, K, 0.0)
        K_b = tl.where(upper, K, 0.0)
        tl.store(tiles + at * 4 + pair, tl.join(tl.sum(K_f, 0), tl.sum(K_b, 0)))
        column_sum_f = tl.sum(K_f, 1)
        column_sum_b = tl.sum(K_b, 1)
        if HAS_DIAGONAL:
            matrix = tl.where(equal, tl.load(diagonals + at + j).to(matrix.dtype)[None, :], matrix)
            if not ALL_HEADS:
                if FOLDED:
                    ddiagonal = tl.sum(tl.where(equal, dmatrix, 0.0), 1)
                else:  # more exact, and slower
                    ddiagonal = tl.sum(values.to(tl.float32) * dys.to(tl.float32), 1)
                tl.store(ddiagonals + at + j, ddiagonal)
        else:
            matrix = tl.where(equal, 0.0, matrix)
        out = tl.dot(matrix.to(dtype), dys, input_precision=PRECISION)
        if ALL_HEADS:
            weights = tl.load(projection + h * P, mask=has_head[:, None], other=0.0)
            out = tl.dot(back, weights, out, input_precision=PRECISION)
        if PAIR:
            far_f, far_b, _, _ = load_decays(decays + at * 4, o)
            dys = tl.load(other_ys + h * stride_yh, mask=(o < limit)[:, None], other=0.0)
            dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
            row = tl.where(part == 0, far_f, far_b)
            exponent = row[None, :] - tl.where(part == 0, column_f, column_b)[:, None]
            if not FOLDED:
                rest_f, rest_b, _, _ = load_rests(steps + at * 8, o)
                rest = tl.where(part == 0, rest_f, rest_b)
                exponent += rest[None, :] - tl.where(part == 0, less_f, less_b)[:, None]
            weight = tl.exp2(exponent)
            if not FOLDED:
                weight *= tl.where(part == 0, dt_f, dt_b)[:, None]
            matrix, K = _entries(weight, across, dmatrix, PACKED)
            dacross += weight * dmatrix
            tl.store(other_sums + at + o, tl.sum(K, 0))
            more = tl.sum(K, 1)
            column_sum_f += tl.where(part == 0, more, 0.0)
            column_sum_b += tl.where(part == 0, 0.0, more)
            out = tl.dot(matrix.to(dtype), dys, out, input_precision=PRECISION)
        tl.store(tiles + at * 4 + 2 * Q + pair, tl.join(column_sum_f, column_sum_b))
        if HAS_STATES:
            total_f = tl.load(totals + h * chunks * 2)
            total_b = tl.load(totals + h * chunks * 2 + 1)
            to_f, to_b = load_weights(column_f, column_b, total_f, total_b, steps + at * 8, j, FOLDED)
            if HAS_IDS:
                to_f *= to_right
                to_b *= to_left
            T = tl.load(adjoint + h * (N * P) + entry)
            out += tl.dot(Bf, T, input_precision=PRECISION) * to_f[:, None]
            T = tl.load(adjoint + (h * (N * P) + state_stride) + entry)
            out += tl.dot(Bb, T, input_precision=PRECISION) * to_b[:, None]
        tl.store(dxs + h * stride_dxh, out.to(dtype), mask=inside)

    keep_f = lower
    keep_b = upper
    if HAS_IDS:
        keep_f &= id_j[:, None] == id_j[None, :]
        keep_b &= id_j[:, None] == id_j[None, :]
    f = tl.where(keep_f, dscores, 0.0).to(dtype)
    b = tl.where(keep_b, dscores, 0.0).to(dtype)
    own = ((batch * G + group) * held + held_at) * (Q * N)
    if HAS_STATES:  # their part; all at once, as no load is moved over a product
        through += own + j[:, None] * N + n[None, :]
        grad_C_f = tl.load(through)
        grad_B_f = tl.load(through + through_stride)
        grad_C_b = tl.load(through + 2 * through_stride)
        grad_B_b = tl.load(through + 3 * through_stride)
    else:
        grad_C_f = tl.zeros([ROWS, N], tl.float32)
        grad_B_f = grad_C_f
        grad_C_b = grad_C_f
        grad_B_b = grad_C_f
    Cf = tl.load(C_f + j[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
    Cb = tl.load(C_b + j[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
    grad_B_f = tl.dot(f, Cf, grad_B_f, input_precision=PRECISION)
    grad_B_b = tl.dot(b, Cb, grad_B_b, input_precision=PRECISION)
    grad_C_f = tl.dot(tl.trans(f), Bf, grad_C_f, input_precision=PRECISION)
    grad_C_b = tl.dot(tl.trans(b), Bb, grad_C_b, input_precision=PRECISION)
    if PAIR:
        if HAS_IDS:
            dacross = tl.where(id_j[:, None] == tl.load(ids + o, mask=o < limit, other=-3)[None, :], dacross, 0.0)
        f = tl.where(part == 0, dacross, 0.0).to(dtype)
        b = tl.where(part == 0, 0.0, dacross).to(dtype)
        Cf = tl.load(C_f + o[:, None] * stride_Cfl + n[None, :], mask=other_f, other=0.0)
        Cb = tl.load(C_b + o[:, None] * stride_Cbl + n[None, :], mask=other_b, other=0.0)
        grad_B_f = tl.dot(f, Cf, grad_B_f, input_precision=PRECISION)
        grad_B_b = tl.dot(b, Cb, grad_B_b, input_precision=PRECISION)
        # dC of the other tile's rows, which has its own part of it: two parts to be summed afterwards.
        grad = tl.dot(tl.trans(f), Bf, input_precision=PRECISION)
        grad = tl.dot(tl.trans(b), Bb, grad, input_precision=PRECISION)
        size = tl.num_programs(0).to(tl.int64) // 2 * (Q * N)
        tl.store(beside + own + o[:, None] * N + n[None, :], grad)
        tl.store(beside + size + own + j[:, None] * N + n[None, :], tl.where(part == 0, grad_C_b, grad_C_f))
    place = begin + j
    to = batch * stride_db + group * stride_dg + n[None, :]
    tl.store(dB_f + to + place[:, None] * stride_dl, grad_B_f.to(dB_f.dtype.element_ty), mask=inside)
    tl.store(dB_b + to + place[:, None] * stride_dl, grad_B_b.to(dB_b.dtype.element_ty), mask=inside)
    # The row without a neighbour has no C to write: its zeros go to the C that nobody reads.
    place = tl.where(place >= SHIFTED, place - SHIFTED, L - 1)[:, None]
    keep = inside & ((part == 0) | (PAIR == 0))
    grad = tl.where(in_f, grad_C_f, 0.0)
    tl.store(dC_f + to + place * stride_dl, grad.to(dC_f.dtype.element_ty), mask=keep)
    place = tl.where(begin + j < L - SHIFTED, begin + j + SHIFTED, 0)[:, None]
    keep = inside & ((part == 1) | (PAIR == 0))
    grad = tl.where(in_b, grad_C_b, 0.0)
    tl.store(dC_b + to + place * stride_dl, grad.to(dC_b.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["L", "G"])
def _pair_kernel(
    beside,
    dC_f,
    dC_b,
    size,
    L,
    G,
    stride_db,
    stride_dl,
    stride_dg,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
):
    """dC of the rows that both tiles of a pair have a part of: causal in the second, anticausal in the first.

    Grid (B G, 2).
    """
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, ROWS) + part * ROWS
    n = tl.arange(0, N)
    at = pid * (2 * ROWS * N) + i[:, None] * N + n[None, :]
    grad = tl.load(beside + at) + tl.load(beside + size + at)
    to = pid // G * stride_db + pid % G * stride_dg + n[None, :]
    if part == 1:
        tl.store(dC_f + to + (i - SHIFTED)[:, None] * stride_dl, grad.to(dC_f.dtype.element_ty), mask=(i < L)[:, None])
    else:
        exists = (i < L - SHIFTED)[:, None]
        place = tl.where(i < L - SHIFTED, i + SHIFTED, 0)[:, None]
        grad = tl.where(exists, grad, 0.0)
        tl.store(dC_b + to + place * stride_dl, grad.to(dC_b.dtype.element_ty), mask=(i < L)[:, None])


@dataclass(frozen=True)
class ValueGradsConfig:
    """Warps and stages."""

    warps: int = 4
    stages: int = 2


class TileSums(NamedTuple):
    """What dt, A and the diagonal need of the tiles, float32."""

    sums: Tensor  # (B, H, L', 4) as chunks of four rows of Q: causal and anticausal row sums of K, and column sums
    beside: Tensor | None  # (B, H, L') in a pair's blocks beside it: causal in the second tile, anticausal in the first
    near: Tensor | None  # (B, H, L', 2) as two: what the next row of a column, or the one before, has, if kept apart
    diagonal: Tensor | None  # (B, H, L') gradient of the diagonal

    @classmethod
    def of(cls, decays: Decays, pair: bool, diagonal: bool, over: bool) -> TileSums:
        """Room for them. over: they may take the decays' place, as who finds a chunk's sums reads its decays last, and
        alone; not so a pair, two programs of one chunk.
        """
        new, shape = decays.sums.new_empty, decays.sums.shape[:3]
        return cls(
            decays.sums if over and not pair else new(*shape, 4),
            new(shape) if pair else None,
            new(*shape, 2) if decays.shifted and decays.steps is not None else None,
            new(shape) if diagonal and decays.diagonal is not None else None,
        )

    def cut(self, rows: slice) -> TileSums:
        """Those of some rows of the batch."""
        beside, near, diagonal = (None if t is None else t[rows] for t in self[1:])
        return TileSums(self.sums[rows], beside, near, diagonal)


def value_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    adjoint: Tensor | None, through: Tensor | None, dx: Tensor, dfeatures: tuple[Tensor, Tensor, Tensor, Tensor],
    sums: TileSums, Q: int, config: ValueGradsConfig, precision: str, back: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
) -> None:  # fmt: skip
    """Writes dx, the gradients of the four features, whose strides are alike, and the sums.

    dx and the features' gradients may be where x, B and C are. Of the chunks from `start` that the adjoint states are
    of, where these are not of all; then B = 1. through: as `feature_grads` gives it.
    back: (its gradient (B, L, H), W (H, H P)), both contiguous, where the diagonal is W x: dx gets gradient W as well.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = cdiv(L, Q)
    held = chunks if adjoint is None else adjoint.shape[2]
    pair = sums.beside is not None
    beside = decays.sums.new_empty(2, batch, G, Q, N) if pair else sums.sums
    parts = sums.sums if through is None else through
    strides = [s for t in (x, dy, *features, dx, dfeatures[0]) for s in t.stride()[:3]]
    _value_grads_kernel[(batch * held * G * (1 + pair),)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if adjoint is None else adjoint, parts, *((x, x) if back is None else back), dx,
        sums.sums if sums.diagonal is None else sums.diagonal, sums.sums,
        sums.sums if sums.beside is None else sums.beside, sums.sums if sums.near is None else sums.near, beside,
        *dfeatures, L, G, chunks, start, held,
        0 if adjoint is None else adjoint.stride(0), parts.stride(0), *strides, H // G, PAIR=pair,
        SHIFTED=int(decays.shifted), HEADS=H // G, HAS_IDS=ids is not None, HAS_DIAGONAL=decays.diagonal is not None,
        ALL_HEADS=0 if back is None else max(16, next_power_of_2(H)), HAS_STATES=adjoint is not None,
        FOLDED=decays.steps is None, PACKED=x.dtype == torch.bfloat16, ROWS=Q // (1 + pair), N=N, P=P,
        PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    if pair:
        _pair_kernel[batch * G, 2](
            beside, dfeatures[1], dfeatures[3], beside.stride(0), L, G, *dfeatures[0].stride()[:3],
            SHIFTED=int(decays.shifted), ROWS=Q // 2, N=N,
            num_warps=4,
        )  # fmt: skip
