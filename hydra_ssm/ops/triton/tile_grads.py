"""Gradients of x, B, C and the diagonal from one reading of x, dy and the states, and the sums that dt and A need.

One program per chunk and group walks over the heads with dS^T, dB and dC in registers. Everything within the chunk is
transposed, tokens j that are read as rows and tokens i that read as columns, so that M^T is the left operand of
dx = M^T dy. Per head, with S the states that enter and T their adjoints, K = dM o M:

    dx = M^T dy + sum over directions of write (B T)      dS += dM o W       write = dt 2^(total - column), read = 2^row
    dC += read (dy S^T)    Rst = (read (dy S^T)) . C      dB += write (x T^T)      Cst = x . (write (B T))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_steps


@triton.jit
def _times(a, b, PACKED: tl.constexpr):
    if PACKED:
        product = (a.to(b.dtype) * b).to(tl.float32)
    else:
        product = a * b.to(tl.float32)
    return product


@triton.jit(do_not_specialize=["L", "chunks", "G"])
def _tile_grads_kernel(
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
    adjoint,
    dx,
    ddiagonals,
    sums,
    products,
    dB_f,
    dC_f,
    dB_b,
    dC_b,
    L,
    G,
    chunks,
    sums_stride,
    product_stride,
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
    """Grid (B chunks G); HEADS are all of a group."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid % G
    chunk = pid // G % chunks
    batch = pid // (G * chunks)
    dtype: tl.constexpr = x.dtype.element_ty
    j = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    inside = (j < limit)[:, None]
    in_f = (((j > 0) | (chunk > 0)) & (j < limit))[:, None]
    in_b = (j + 1 < limit)[:, None]
    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - 1) * stride_Cfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + 1) * stride_Cbl
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=inside, other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=inside, other=0.0)
    Cf = tl.load(C_f + j[:, None] * stride_Cfl + n[None, :], mask=in_f, other=0.0)
    Cb = tl.load(C_b + j[:, None] * stride_Cbl + n[None, :], mask=in_b, other=0.0)
    lower = j[None, :] > j[:, None]
    equal = j[None, :] == j[:, None]
    scores = tl.where(
        lower,
        tl.dot(Bf, tl.trans(Cf), input_precision=PRECISION),
        tl.dot(Bb, tl.trans(Cb), input_precision=PRECISION),
    )
    scores = tl.where(equal, 0.0, scores)
    if HAS_IDS:
        ids += batch * L + begin
        id_j = tl.load(ids + j, mask=j < limit, other=-3)
        first = tl.load(ids)
        last = tl.load(ids + tl.minimum(limit, Q) - 1)
        left = tl.load(ids - 1, mask=chunk > 0, other=-2)
        right = tl.load(ids + Q, mask=limit > Q, other=-2)
        same = id_j[:, None] == id_j[None, :]
        scores = tl.where(same, scores, 0.0)
    scores = scores.to(dtype)
    dscores = tl.zeros([Q, Q], tl.float32)
    grad_Bf = tl.zeros([Q, N], tl.float32)
    grad_Bb = tl.zeros([Q, N], tl.float32)
    grad_Cf = tl.zeros([Q, N], tl.float32)
    grad_Cb = tl.zeros([Q, N], tl.float32)

    head0 = group * HEADS
    H = G * HEADS
    at = (batch * H + head0) * chunks + chunk
    decays += at * (Q * 4)
    steps += at * (Q * 2)
    diagonals += at * Q
    ddiagonals += at * Q
    sums += at * Q
    totals += at * 2
    products += at
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + (j[:, None] * stride_xl + p[None, :])
    ys = dy + batch * stride_yb + head0 * stride_yh + begin * stride_yl + (j[:, None] * stride_yl + p[None, :])
    dxs = dx + ((batch * L + begin) * H + head0) * P + (j[:, None] * (H * P) + p[None, :])
    entry = ((batch * chunks + chunk) * H + head0) * (N * P) + (n[:, None] * P + p[None, :])
    for h in tl.range(0, HEADS, num_stages=STAGES):
        off = h * (chunks * Q)
        row_f, row_b, column_f, column_b = load_decays(decays + off * 4, j)
        values = tl.load(xs + h * stride_xh, mask=inside, other=0.0)
        dys = tl.load(ys + h * stride_yh, mask=inside, other=0.0)
        dmatrix = tl.dot(values, tl.trans(dys), input_precision=PRECISION)
        weight = tl.exp2(tl.where(lower, row_f[None, :] - column_f[:, None], row_b[None, :] - column_b[:, None]))
        if not FOLDED:
            dt_f, dt_b = load_steps(steps + off * 2, j)
            weight *= tl.where(lower, dt_f[:, None], dt_b[:, None])
        weight = tl.where(equal, 0.0, weight)  # the exponent there is no decay and may overflow
        if PACKED:
            # In the products' own precision: a loop would keep the scores in float32 registers instead.
            matrix = weight.to(dtype) * scores
            K = matrix.to(tl.float32) * dmatrix
        else:
            matrix = weight * scores.to(tl.float32)
            K = matrix * dmatrix
        if HAS_DIAGONAL:
            matrix = tl.where(equal, tl.load(diagonals + off + j).to(matrix.dtype)[None, :], matrix)
            tl.store(ddiagonals + off + j, tl.sum(values.to(tl.float32) * dys.to(tl.float32), 1))
        out = tl.dot(matrix.to(dtype), dys, input_precision=PRECISION)
        dscores += weight * dmatrix
        K_f = tl.where(lower, K, 0.0)
        K_b = tl.where(lower, 0.0, K)
        column_sum_f = tl.sum(K_f, 1)
        column_sum_b = tl.sum(K_b, 1)
        row_sum_f = tl.sum(K_f, 0)
        row_sum_b = tl.sum(K_b, 0)
        tl.store(sums + off + j, row_sum_f)
        tl.store(sums + off + sums_stride + j, column_sum_f)
        tl.store(sums + off + sums_stride * 2 + j, row_sum_b)
        tl.store(sums + off + sums_stride * 3 + j, column_sum_b)
        if HAS_STATES:
            total_f = tl.load(totals + h * chunks * 2)
            total_b = tl.load(totals + h * chunks * 2 + 1)
            write_f = tl.exp2(total_f - column_f)
            write_b = tl.exp2(total_b - column_b)
            read_f = tl.exp2(row_f)
            read_b = tl.exp2(row_b)
            g_f = tl.exp2(total_f)
            g_b = tl.exp2(total_b)
            if not FOLDED:
                write_f *= dt_f
                write_b *= dt_b
            if HAS_IDS:
                write_f = tl.where(id_j == last, write_f, 0.0)
                write_b = tl.where(id_j == first, write_b, 0.0)
                read_f = tl.where(id_j == left, read_f, 0.0)
                read_b = tl.where(id_j == right, read_b, 0.0)
                g_f = tl.where(left == last, g_f, 0.0)
                g_b = tl.where(right == first, g_b, 0.0)
            S = tl.load(states + entry + h * (N * P))
            T = tl.load(adjoint + entry + h * (N * P))
            tl.store(products + h * chunks, g_f * tl.sum(S.to(tl.float32) * T.to(tl.float32)))
            through = tl.dot(dys, tl.trans(S), input_precision=PRECISION) * read_f[:, None]
            grad_Cf += through
            tl.store(sums + off + sums_stride * 4 + j, tl.sum(_times(through, Cf, PACKED), 1))
            grad_Bf += tl.dot(values, tl.trans(T), input_precision=PRECISION) * write_f[:, None]
            through = tl.dot(Bf, T, input_precision=PRECISION) * write_f[:, None]
            out += through
            tl.store(sums + off + sums_stride * 5 + j, tl.sum(through * values.to(tl.float32), 1))

            S = tl.load(states + entry + (h * (N * P) + state_stride))
            T = tl.load(adjoint + entry + (h * (N * P) + state_stride))
            tl.store(products + h * chunks + product_stride, g_b * tl.sum(S.to(tl.float32) * T.to(tl.float32)))
            through = tl.dot(dys, tl.trans(S), input_precision=PRECISION) * read_b[:, None]
            grad_Cb += through
            tl.store(sums + off + sums_stride * 6 + j, tl.sum(_times(through, Cb, PACKED), 1))
            grad_Bb += tl.dot(values, tl.trans(T), input_precision=PRECISION) * write_b[:, None]
            through = tl.dot(Bb, T, input_precision=PRECISION) * write_b[:, None]
            out += through
            tl.store(sums + off + sums_stride * 7 + j, tl.sum(through * values.to(tl.float32), 1))
        tl.store(dxs + h * P, out.to(dtype), mask=inside)

    keep_f = lower
    keep_b = j[None, :] < j[:, None]
    if HAS_IDS:
        keep_f &= same
        keep_b &= same
    place = begin + j
    at = (batch * L * G + group) * N + place[:, None] * (G * N) + n[None, :]
    f = tl.where(keep_f, dscores, 0.0).to(dtype)
    tl.store(dB_f + at, tl.dot(f, Cf, grad_Bf, input_precision=PRECISION).to(dtype), mask=inside)
    # A row's C is its neighbour's. The row without one has none to write: its zeros go to the C that nobody reads.
    to = tl.where(place > 0, place - 1, L - 1)
    grad_Cf = tl.dot(tl.trans(f), Bf, grad_Cf, input_precision=PRECISION)
    at_C = (batch * L * G + group) * N + to[:, None] * (G * N) + n[None, :]
    tl.store(dC_f + at_C, tl.where(in_f, grad_Cf, 0.0).to(dtype), mask=inside)
    b = tl.where(keep_b, dscores, 0.0).to(dtype)
    tl.store(dB_b + at, tl.dot(b, Cb, grad_Bb, input_precision=PRECISION).to(dtype), mask=inside)
    to = tl.where(place < L - 1, place + 1, 0)
    grad_Cb = tl.dot(tl.trans(b), Bb, grad_Cb, input_precision=PRECISION)
    at_C = (batch * L * G + group) * N + to[:, None] * (G * N) + n[None, :]
    tl.store(dC_b + at_C, tl.where(in_b, grad_Cb, 0.0).to(dtype), mask=inside)


@dataclass(frozen=True)
class TileGradsConfig:
    """Warps and stages."""

    warps: int = 8
    stages: int = 2


def tile_grads(
    x: Tensor, dy: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    states: Tensor | None, adjoint: Tensor | None, Q: int, config: TileGradsConfig, precision: str,
) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """(dx, d diagonal (B, H, L') or None, [dB_f, dC_f, dB_b, dC_b], sums (8, B, H, L'), products (2, B, H, chunks)).

    sums: row and column sums of K, causal, then anticausal; Rst and Cst, causal, then anticausal. What belongs to the
    states (the last four sums, products) is unwritten where there are none.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddiagonal = None if decays.diagonal is None else torch.empty_like(decays.diagonal)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in features]
    sums = decays.sums.new_empty(8, batch, H, chunks * Q)
    products = decays.sums.new_empty(2, batch, H, chunks)
    strides = [s for t in (x, dy, *features) for s in t.stride()[:3]]
    _tile_grads_kernel[(batch * chunks * G,)](
        x, dy, *features, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if states is None else states, x if adjoint is None else adjoint, dx,
        sums if ddiagonal is None else ddiagonal, sums, products, *grads, L, G, chunks, sums.stride(0),
        products.stride(0), 0 if states is None else states.stride(0), *strides, HEADS=H // G,
        HAS_IDS=ids is not None, HAS_DIAGONAL=ddiagonal is not None, HAS_STATES=states is not None,
        FOLDED=decays.steps is None, PACKED=x.dtype == torch.bfloat16, Q=Q, N=N, P=P, PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return dx, ddiagonal, grads, sums, products
