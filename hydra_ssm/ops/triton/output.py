"""The product of both triangles within chunks, and what each row reads from the states that enter its chunk.

The scores C B^T belong to a group, not to a head: a program finds them once, masked (triangle, documents), and loops
over heads. Per head it weighs them with 2^(row - column), puts the diagonal in, adds the states' part, and writes y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_rests, load_steps
from .sizes import cdiv


@triton.jit(do_not_specialize=["L", "chunks", "start", "held", "heads"])
def _output_kernel(
    x,
    B_f,
    C_f,
    B_b,
    C_b,
    decays,
    steps,
    diagonals,
    ids,
    states,
    y,
    L,
    H,
    chunks,
    start,
    held,
    heads_per_group,
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
    heads,
    HEADS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    SHIFTED: tl.constexpr,
    HAS_STATES: tl.constexpr,
    FOLDED: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B held (Q / ROWS) (H / HEADS)), what shares a chunk side by side: B, C and x then come from cache.

    Of the chunks `held` from `start`, whose states and rows of y alone there is room for.
    """
    pid = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = Q // ROWS
    part = pid % parts
    pid = pid // parts
    programs = H // HEADS
    head0 = pid % programs * HEADS
    held_at = pid // programs % held
    chunk = start + held_at
    batch = pid // (programs * held)
    group = head0 // heads_per_group
    i = part * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
    limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
    dtype: tl.constexpr = x.dtype.element_ty

    C_f += batch * stride_Cfb + group * stride_Cfg + (begin - SHIFTED) * stride_Cfl
    B_f += batch * stride_Bfb + group * stride_Bfg + begin * stride_Bfl
    C_b += batch * stride_Cbb + group * stride_Cbg + (begin + SHIFTED) * stride_Cbl
    B_b += batch * stride_Bbb + group * stride_Bbg + begin * stride_Bbl
    has_left = ((i > 0) | (chunk > 0) | (SHIFTED == 0)) & (i < limit)
    Cf = tl.load(C_f + i[:, None] * stride_Cfl + n[None, :], mask=has_left[:, None], other=0.0)
    Cb = tl.load(C_b + i[:, None] * stride_Cbl + n[None, :], mask=(i + SHIFTED < limit)[:, None], other=0.0)
    Bf = tl.load(B_f + j[:, None] * stride_Bfl + n[None, :], mask=(j < limit)[:, None], other=0.0)
    Bb = tl.load(B_b + j[:, None] * stride_Bbl + n[None, :], mask=(j < limit)[:, None], other=0.0)
    lower = i[:, None] > j[None, :]
    equal = i[:, None] == j[None, :]
    scores = tl.where(
        lower,
        tl.dot(Cf, tl.trans(Bf), input_precision=PRECISION),
        tl.dot(Cb, tl.trans(Bb), input_precision=PRECISION),
    )
    if HAS_IDS:
        ids += batch * L + begin
        id_row = tl.load(ids + i, mask=i < limit, other=-3)
        id_column = tl.load(ids + j, mask=j < limit, other=-3)
        scores = tl.where(id_row[:, None] == id_column[None, :], scores, 0.0)
        left = tl.load(ids - 1, mask=chunk > 0, other=-2)
        right = tl.load(ids + Q, mask=limit > Q, other=-2)
        from_left = (id_row == left).to(tl.float32)
        from_right = (id_row == right).to(tl.float32)
    if PACKED:
        scores = scores.to(dtype)

    here = (batch * H + head0) * (chunks * Q) + chunk * Q
    decays += here * 4
    steps += here * 8
    diagonals += here
    xs = x + batch * stride_xb + head0 * stride_xh + begin * stride_xl + j[:, None] * stride_xl + p[None, :]
    ys = y + ((batch * L + held_at * Q) * H + head0) * P + i[:, None] * (H * P) + p[None, :]
    state_f = states + ((batch * held + held_at) * H + head0) * (N * P) + n[:, None] * P + p[None, :]
    state_b = state_f + state_stride
    for h in tl.range(0, heads if HEADS == 1 else HEADS, num_stages=STAGES):  # see tiles.py
        row_f, row_b, column_f, column_b = load_decays(decays + h * (chunks * Q * 4), j)
        if ROWS < Q:
            row_f, row_b, _, _ = load_decays(decays + h * (chunks * Q * 4), i)
        values = tl.load(xs + h * stride_xh, mask=(j < limit)[:, None], other=0.0)
        exponent = tl.where(lower, row_f[:, None] - column_f[None, :], row_b[:, None] - column_b[None, :])
        # On the diagonal the exponent is no decay and may overflow: it is replaced after the product.
        if HAS_DIAGONAL:
            d = tl.load(diagonals + h * (chunks * Q) + i)[:, None]
        else:
            d = 0.0
        if PACKED:
            matrix = tl.where(equal, d.to(dtype), tl.exp2(exponent).to(dtype) * scores)
        else:
            if not FOLDED:
                at = steps + h * (chunks * Q * 8)
                rest_f, rest_b, _, _ = load_rests(at, i)
                _, _, less_f, less_b = load_rests(at, j)
                exponent += tl.where(lower, rest_f[:, None] - less_f[None, :], rest_b[:, None] - less_b[None, :])
            weight = tl.exp2(exponent)
            if not FOLDED:
                dt_f, dt_b = load_steps(at, j)
                weight *= tl.where(lower, dt_f[None, :], dt_b[None, :])
            matrix = tl.where(equal, d, weight * scores).to(dtype)
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
        tl.store(ys + h * P, out.to(dtype), mask=(i < limit)[:, None])


@dataclass(frozen=True)
class OutputConfig:
    """Heads a program loops over, rows of a chunk it owns, whether weights are multiplied in the dtype of x."""

    heads: int = 4
    rows: int = 128
    packed: bool = False
    warps: int = 8
    stages: int = 2


def chunk_outputs(
    x: Tensor, features: tuple[Tensor, Tensor, Tensor, Tensor], decays: Decays, ids: Tensor | None,
    states: Tensor | None, Q: int, config: OutputConfig, precision: str, start: int = 0,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P), contiguous; features B_f, C_f, B_b, C_b (B, L, G, N), unit last strides everywhere.

    B = 1: states may be of some chunks alone, from `start`; then y has the tokens of these.
    """
    batch, L, H, P = x.shape
    G, N = features[0].shape[2:]
    chunks = cdiv(L, Q)
    rows = min(config.rows, Q)
    held = chunks if states is None else states.shape[2]
    y = torch.empty(batch, min(L - start * Q, held * Q), H, P, dtype=x.dtype, device=x.device)
    strides = [s for t in (x, *features) for s in t.stride()[:3]]
    _output_kernel[(batch * held * (Q // rows) * (H // config.heads),)](
        x, *features, decays.sums, decays.sums if decays.steps is None else decays.steps,
        decays.sums if decays.diagonal is None else decays.diagonal, x if ids is None else ids,
        x if states is None else states, y, L, H, chunks, start, held, H // G,
        0 if states is None else states.stride(0),
        *strides, config.heads, HEADS=config.heads, HAS_IDS=ids is not None, HAS_DIAGONAL=decays.diagonal is not None,
        SHIFTED=int(decays.shifted), HAS_STATES=states is not None, FOLDED=decays.steps is None,
        PACKED=config.packed, Q=Q, ROWS=rows, N=N, P=P, PRECISION=precision, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return y
