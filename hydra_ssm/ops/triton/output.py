"""The product of both triangles within chunks, and what each row reads from the states that enter its chunk.

The scores C B^T belong to a group, not to a head: a program finds them once, masked (triangle, documents), and loops
over heads. Per head it weighs them with exp(row - column), adds the states' part and the diagonal, and writes y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .states import row_sum


@triton.jit
def _output_kernel(
    x,
    B_f,
    C_f,
    B_b,
    C_b,
    sums,
    steps,
    ids,
    diagonal,
    states,
    y,
    L,
    H,
    chunks,
    heads_per_group,
    direction_stride,
    state_stride,
    stride_xb,
    stride_xl,
    stride_xh,
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
    stride_db,
    stride_dl,
    stride_dh,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks H / HEADS), the heads of a chunk next to each other: B and C are then read from cache."""
    pid = tl.program_id(0).to(tl.int64)
    programs = H // HEADS
    head0 = pid % programs * HEADS
    chunk = pid // programs % chunks
    batch = pid // (programs * chunks)
    group = head0 // heads_per_group
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    place = chunk * Q + i
    inside = place < L
    dtype: tl.constexpr = x.dtype.element_ty

    rows_B = B_f + batch * stride_Bfb + group * stride_Bfg + place[:, None] * stride_Bfl + n[None, :]
    rows_C = C_f + batch * stride_Cfb + group * stride_Cfg + (place - 1)[:, None] * stride_Cfl + n[None, :]
    Cf = tl.load(rows_C, mask=(inside & (place > 0))[:, None], other=0.0)
    scores_f = tl.dot(Cf, tl.trans(tl.load(rows_B, mask=inside[:, None], other=0.0)), input_precision=PRECISION)
    rows_B = B_b + batch * stride_Bbb + group * stride_Bbg + place[:, None] * stride_Bbl + n[None, :]
    rows_C = C_b + batch * stride_Cbb + group * stride_Cbg + (place + 1)[:, None] * stride_Cbl + n[None, :]
    Cb = tl.load(rows_C, mask=(place + 1 < L)[:, None], other=0.0)
    scores_b = tl.dot(Cb, tl.trans(tl.load(rows_B, mask=inside[:, None], other=0.0)), input_precision=PRECISION)
    lower = i[:, None] > i[None, :]
    scores = tl.where(lower, scores_f, tl.where(i[:, None] < i[None, :], scores_b, 0.0))
    if HAS_IDS:
        id_row = tl.load(ids + batch * L + place, mask=inside, other=-3)
        scores = tl.where(id_row[:, None] == id_row[None, :], scores, 0.0)
        left = tl.load(ids + batch * L + chunk * Q - 1, mask=chunk > 0, other=-2)
        right = tl.load(ids + batch * L + chunk * Q + Q, mask=chunk * Q + Q < L, other=-2)
        from_left = (id_row == left).to(tl.float32)
        from_right = (id_row == right).to(tl.float32)
    if PACKED:
        scores = scores.to(dtype)

    here = (batch * H + head0) * (chunks * Q) + chunk * Q
    sum_f = sums + here
    sum_b = sums + direction_stride + here
    step_f = steps + here
    step_b = steps + direction_stride + here
    xs = x + batch * stride_xb + head0 * stride_xh + place[:, None] * stride_xl + p[None, :]
    ys = y + (batch * L * H + head0) * P + place[:, None] * (H * P) + p[None, :]
    ds = diagonal + batch * stride_db + head0 * stride_dh + place * stride_dl
    state_f = states + ((batch * chunks + chunk) * H + head0) * (N * P) + n[:, None] * P + p[None, :]
    state_b = state_f + state_stride
    for h in tl.range(0, HEADS, num_stages=STAGES):
        at = h * (chunks * Q)
        row_f = row_sum(sum_f + at, i, 0, Q)
        row_b = row_sum(sum_b + at, i, 1, Q)
        # dt as part of the exponent; where it is zero the exponent is -inf
        column_f = tl.load(sum_f + at + i) - tl.log2(tl.load(step_f + at + i))
        column_b = tl.load(sum_b + at + i) - tl.log2(tl.load(step_b + at + i))
        values = tl.load(xs + h * stride_xh, mask=inside[:, None], other=0.0)
        exponent = tl.where(lower, row_f[:, None] - column_f[None, :], row_b[:, None] - column_b[None, :])
        # Masked scores are zero and their exponents at most a step's decay: the bound keeps zero times infinity away.
        weight = tl.exp2(tl.minimum(exponent, 120.0))
        if PACKED:
            matrix = weight.to(dtype) * scores
        else:
            matrix = (weight * scores).to(dtype)
        out = tl.dot(matrix, values, input_precision=PRECISION)
        if HAS_STATES:
            read_f = tl.exp2(row_f)
            read_b = tl.exp2(row_b)
            if HAS_IDS:
                read_f *= from_left
                read_b *= from_right
            Sf = tl.load(state_f + h * (N * P))
            Sb = tl.load(state_b + h * (N * P))
            out += tl.dot(Cf, Sf, input_precision=PRECISION) * read_f[:, None]
            out += tl.dot(Cb, Sb, input_precision=PRECISION) * read_b[:, None]
        if HAS_DIAGONAL:
            d = tl.load(ds + h * stride_dh, mask=inside, other=0.0).to(tl.float32)
            out += values.to(tl.float32) * d[:, None]
        tl.store(ys + h * P, out.to(dtype), mask=inside[:, None])


@dataclass(frozen=True)
class OutputConfig:
    """Heads a program loops over, whether weights are multiplied in the dtype of x, warps and stages."""

    heads: int = 4
    packed: bool = False
    warps: int = 8
    stages: int = 2


def chunk_outputs(
    x: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], sums: Tensor, steps: Tensor, ids: Tensor | None,
    diagonal: Tensor | None, states: Tensor | None, Q: int, config: OutputConfig, precision: str,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P), contiguous; features B_f, C_f, B_b, C_b (B, L, G, N), unit last strides everywhere."""
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = triton.cdiv(L, Q)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = [s for t in (x, *features) for s in t.stride()[:3]]
    _output_kernel[(batch * chunks * (H // config.heads),)](
        x, *features, sums, steps, x if ids is None else ids, x if diagonal is None else diagonal,
        x if states is None else states, y, L, H, chunks, H // G, sums.stride(0),
        0 if states is None else states.stride(0), *strides, *((0, 0, 0) if diagonal is None else diagonal.stride()),
        HEADS=config.heads, HAS_IDS=ids is not None, HAS_DIAGONAL=diagonal is not None, HAS_STATES=states is not None,
        PACKED=config.packed, Q=Q, N=N, P=P, PRECISION=precision, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return y
