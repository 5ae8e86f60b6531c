"""Gradients of dt, A and the diagonal from the sums that the other kernels left.

With R and Q the row and column sums of K within the chunk, Rst and Cst those through the states, per direction:

    da_k = sum_{i >= k} (R_{i + 1} + Rst_{i + 1} - Q_i) + sum_{j < k} Cst_j + 2^total <T, S>      (mirrored: anticausal)

where rows are shifted; R_i + Rst_i in their first place where they are not.
    ddt = (Q + Cst) / dt + A da      dA = sum dt da

What neighbours give has no decay. Under strong decay it is nearly all of R and Q, and would cancel in da but for its
rounding, so float32 keeps it apart and adds it to Q for ddt alone; no sum that a token is not part of passes it.

Raw steps: draw = ddt (d dt / d raw), dbias = sum draw, dA_log = A dA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import LOG2E, SMALLEST_STEP, STRONGEST, Steps, final_steps, load_rates
from .feature_grads import StateGrads
from .sizes import cdiv, next_power_of_2
from .sums import column_sums
from .value_grads import TileSums

BLOCK_HEADS = 8


@triton.jit
def _two(pointer, at, keep):
    """Two numbers side by side, for each of a (heads, tokens) tile."""
    return tl.split(
        tl.load(pointer + at[:, :, None] * 2 + tl.arange(0, 2)[None, None, :], mask=keep[:, :, None], other=0.0)
    )


@triton.jit
def _direction(
    dt, ddt, rows, columns, whole, state_sums, state_stride, products, at, at_chunk, keep, read, before, exists, rate,
    bias, low, high, h, H, place, stride_l, stride_h, out_stride_l, out_stride_h,
    REVERSE: tl.constexpr, SHIFTED: tl.constexpr, RAW: tl.constexpr, HAS_STATES: tl.constexpr,
    SMALLEST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Writes ddt; returns its sum over the tokens and sum dt da, of each head. Tiles are (heads, tokens).

    rows are those that read up to a token, at `read`; columns are as da takes them, whole as ddt does.
    """
    ON: tl.constexpr = -1 if REVERSE else 1
    da = rows - columns
    if HAS_STATES:
        da += tl.load(state_sums + at + ON * SHIFTED, mask=read, other=0.0)
    da = tl.cumsum(da, 1, reverse=not REVERSE)
    if HAS_STATES:
        through = state_sums + state_stride
        da += tl.cumsum(tl.load(through + at - ON, mask=before, other=0.0), 1, reverse=REVERSE)
        da += tl.load(products + at_chunk, mask=h < H, other=0.0)[:, None]
        whole += tl.load(through + at, mask=keep, other=0.0)
    step = tl.load(dt + place[None, :] * stride_l + h[:, None] * stride_h, mask=keep, other=0.0)
    step, slope = final_steps(step, bias, low, high, exists, RAW)
    # Where nothing passes a token its da is zero; what the sums leave of it is rounding, and A may be large.
    da = tl.where(step * rate[:, None] < -MOST, 0.0, da)
    grad = (whole / tl.where(step < SMALLEST, SMALLEST, step) + rate[:, None] * da) * slope
    to = ddt + place[None, :] * out_stride_l + h[:, None] * out_stride_h
    tl.store(to, grad.to(ddt.dtype.element_ty), mask=keep)
    return tl.sum(grad, 1), tl.sum(step * da, 1)


@triton.jit(do_not_specialize=["L", "chunks", "start", "held", "A_stride"])
def _step_grads_kernel(
    dt_f,
    dt_b,
    A,
    bias,
    ids,
    row_sums,
    beside,
    column_sums,
    nears,
    ddiagonals,
    state_sums,
    products,
    ddt_f,
    ddt_b,
    sums,
    ddiagonal,
    L,
    H,
    chunks,
    start,
    held,
    A_stride,
    low,
    high,
    state_stride,
    product_stride,
    stride_fb,
    stride_fl,
    stride_fh,
    stride_bb,
    stride_bl,
    stride_bh,
    out_stride_fb,
    out_stride_fl,
    out_stride_fh,
    out_stride_bb,
    out_stride_bl,
    out_stride_bh,
    SHARED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RAW: tl.constexpr,
    HAS_IDS: tl.constexpr,
    PAIR: tl.constexpr,
    NEAR: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    SMALLEST: tl.constexpr,
    MOST: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (B held, H / BLOCK_H), of the chunks `held` from `start`."""
    pid = tl.program_id(0).to(tl.int64)
    batch, held_at = pid // held, pid % held
    chunk = start + held_at
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    place = chunk * Q + i
    rate_f = load_rates(A, h, H, RAW)
    rate_b = load_rates(A + A_stride, h, H, RAW)
    at = (batch * H + h)[:, None] * (held * Q) + (held_at * Q + i)[None, :]
    at_chunk = (batch * H + h) * held + held_at
    keep = (h < H)[:, None] & (place < L)[None, :]
    exists = keep
    offset = 0.0
    if RAW:
        offset = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[:, None]
        if HAS_IDS:
            exists &= (tl.load(ids + batch * L + place, mask=place < L, other=-1) >= 0)[None, :]
    before = keep & (i > 0)[None, :]
    after = keep & ((i < Q - 1) & (place + 1 < L))[None, :]
    read_f = after if SHIFTED else keep
    read_b = before if SHIFTED else keep
    rows_f, _ = _two(row_sums, at + SHIFTED, read_f)
    _, rows_b = _two(row_sums, at - SHIFTED, read_b)
    columns_f, columns_b = _two(column_sums, at, keep)
    if PAIR:
        rows_f += tl.load(beside + at + SHIFTED, mask=read_f & (i + SHIFTED >= Q // 2)[None, :], other=0.0)
        rows_b += tl.load(beside + at - SHIFTED, mask=read_b & (i - SHIFTED < Q // 2)[None, :], other=0.0)
    whole_f = columns_f
    whole_b = columns_b
    if NEAR:
        near_f, near_b = _two(nears, at, keep)
        whole_f += near_f
        whole_b += near_b
    raw_f, dA_f = _direction(
        dt_f + batch * stride_fb, ddt_f + batch * out_stride_fb, rows_f, columns_f, whole_f,
        state_sums, state_stride, products, at, at_chunk, keep, read_f, before, exists, rate_f, offset, low, high, h, H,
        place, stride_fl, stride_fh, out_stride_fl, out_stride_fh, False, SHIFTED, RAW, HAS_STATES, SMALLEST, MOST,
    )  # fmt: skip
    raw_b, dA_b = _direction(
        dt_b + batch * stride_bb, ddt_b + batch * out_stride_bb, rows_b, columns_b, whole_b,
        state_sums + 2 * state_stride, state_stride, products + product_stride, at, at_chunk, keep, read_b, after,
        exists, rate_b, offset, low, high, h, H,
        place, stride_bl, stride_bh, out_stride_bl, out_stride_bh, True, SHIFTED, RAW, HAS_STATES, SMALLEST, MOST,
    )  # fmt: skip
    if RAW:
        dA_f *= rate_f
        dA_b *= rate_b
    sums += (batch * chunks + chunk) * ((3 - SHARED) * H) + h
    if SHARED:
        tl.store(sums, dA_f + dA_b, mask=h < H)
    else:
        tl.store(sums, dA_f, mask=h < H)
        tl.store(sums + H, dA_b, mask=h < H)
    tl.store(sums + (2 - SHARED) * H, raw_f + raw_b, mask=h < H)
    if HAS_DIAGONAL:
        d = tl.load(ddiagonals + at, mask=keep, other=0.0)
        to = ddiagonal + batch * L * H + place[None, :] * H + h[:, None]
        tl.store(to, d.to(ddiagonal.dtype.element_ty), mask=keep)


class StepGrads(NamedTuple):
    """Where gradients of the steps go, and what those of A and the bias are sums of."""

    ddt_f: Tensor  # (B, L, H), any strides
    ddt_b: Tensor
    sums: Tensor  # (B, chunks, 2 or 3, H) float32: A's, of each direction where they have their own, and the bias's
    ddiagonal: Tensor | None  # (B, L, H)

    @classmethod
    def of(cls, steps: Steps, diagonal: Tensor | None, Q: int, ddt_f: Tensor | None, ddt_b: Tensor | None) -> StepGrads:
        """New ones where they are not given."""
        (batch, L, H), device = steps.dt_f.shape, steps.A.device

        def new(like: Tensor) -> Tensor:
            return torch.empty(like.shape, dtype=like.dtype, device=device)

        return cls(
            new(steps.dt_f) if ddt_f is None else ddt_f,
            new(steps.dt_b) if ddt_b is None else ddt_b,
            torch.empty(batch, cdiv(L, Q), 1 + steps.A.ndim, H, dtype=torch.float32, device=device),
            None if diagonal is None else new(diagonal),
        )

    def cut(self, rows: slice) -> StepGrads:
        """Those of some rows of the batch."""
        ddiagonal = None if self.ddiagonal is None else self.ddiagonal[rows]
        return StepGrads(self.ddt_f[rows], self.ddt_b[rows], self.sums[rows], ddiagonal)

    def summed(self, steps: Steps) -> tuple[Tensor, Tensor | None]:
        """dA and dbias, in their tensors' dtypes."""
        A, bias = steps.A, steps.bias
        dA, dbias = column_sums(self.sums.flatten(0, 1), A.numel(), A.dtype, None if bias is None else bias.dtype)
        return dA.view(A.shape), None if bias is None else dbias


def step_grads(
    steps: Steps, ids: Tensor | None, tiles: TileSums, through: StateGrads | None, Q: int, to: StepGrads,
    shifted: bool = True, start: int = 0,
) -> None:  # fmt: skip
    """Writes what the chunks from `start` that the sums are of give; B = 1 where these are not all."""
    dt_f, dt_b, A, bias = steps.dt_f, steps.dt_b, steps.A, steps.bias
    batch, L, H = dt_f.shape
    held = tiles.rows.shape[2] // Q
    state_sums, products = (None, None) if through is None else (through.sums, through.products)
    block = min(next_power_of_2(H), BLOCK_HEADS)
    _step_grads_kernel[batch * held, cdiv(H, block)](
        dt_f, dt_b, A, A if bias is None else bias, dt_f if ids is None else ids,
        tiles.rows, tiles.rows if tiles.beside is None else tiles.beside, tiles.columns,
        tiles.rows if tiles.near is None else tiles.near,
        tiles.rows if tiles.diagonal is None else tiles.diagonal, tiles.rows if state_sums is None else state_sums,
        tiles.rows if products is None else products, to.ddt_f, to.ddt_b, to.sums,
        to.sums if to.ddiagonal is None else to.ddiagonal, L, H, cdiv(L, Q), start, held, steps.A_stride,
        *steps.limits, 0 if state_sums is None else state_sums.stride(0), 0 if products is None else products.stride(0),
        *dt_f.stride(), *dt_b.stride(), *to.ddt_f.stride(), *to.ddt_b.stride(), SHARED=int(A.ndim == 1),
        SHIFTED=int(shifted), RAW=bias is not None, HAS_IDS=ids is not None, PAIR=tiles.beside is not None,
        NEAR=tiles.near is not None, HAS_DIAGONAL=to.ddiagonal is not None, HAS_STATES=state_sums is not None,
        SMALLEST=SMALLEST_STEP, MOST=STRONGEST / LOG2E, Q=Q, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
