"""Gradients of dt, A and the diagonal from the sums that the other kernels left.

With R and Q the row and column sums of K within the chunk, Rst and Cst those through the states, per direction:

    da_k = sum_{i > k} (R + Rst)_i - sum_{j >= k} Q_j + sum_{j < k} Cst_j + 2^total <T, S>      (mirrored: anticausal)
    ddt = (Q + Cst) / dt + A da      dA = sum dt da
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import SMALLEST_STEP
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
    dt, ddt, rows, columns, state_sums, state_stride, products, at, at_chunk, keep, rate,
    h, H, place, stride_l, stride_h,
    REVERSE: tl.constexpr, HAS_STATES: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Writes ddt; returns sum dt da of each head. Tiles are (heads, tokens)."""
    if HAS_STATES:
        rows += tl.load(state_sums + at, mask=keep, other=0.0)
        through = tl.load(state_sums + state_stride + at, mask=keep, other=0.0)
    da = tl.cumsum(rows - columns, 1, reverse=not REVERSE) - rows
    if HAS_STATES:
        da += tl.cumsum(through, 1, reverse=REVERSE) - through
        da += tl.load(products + at_chunk, mask=h < H, other=0.0)[:, None]
        columns += through
    step = tl.load(dt + place[None, :] * stride_l + h[:, None] * stride_h, mask=keep, other=0.0).to(tl.float32)
    grad = columns / tl.maximum(step, SMALLEST) + rate[:, None] * da
    tl.store(ddt + place[None, :] * H + h[:, None], grad.to(ddt.dtype.element_ty), mask=keep)
    return tl.sum(step * da, 1)


@triton.jit(do_not_specialize=["L", "chunks"])
def _step_grads_kernel(
    dt_f,
    dt_b,
    A,
    row_sums,
    beside,
    column_sums,
    ddiagonals,
    state_sums,
    products,
    ddt_f,
    ddt_b,
    dA,
    ddiagonal,
    L,
    H,
    chunks,
    state_stride,
    product_stride,
    stride_fb,
    stride_fl,
    stride_fh,
    stride_bb,
    stride_bl,
    stride_bh,
    PAIR: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    HAS_STATES: tl.constexpr,
    SMALLEST: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (B chunks, H / BLOCK_H)."""
    pid = tl.program_id(0).to(tl.int64)
    batch, chunk = pid // chunks, pid % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    place = chunk * Q + i
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    at = (batch * H + h)[:, None] * (chunks * Q) + place[None, :]
    at_chunk = (batch * H + h) * chunks + chunk
    out = batch * L * H
    keep = (h < H)[:, None] & (place < L)[None, :]
    rows_f, rows_b = _two(row_sums, at, keep)
    columns_f, columns_b = _two(column_sums, at, keep)
    if PAIR:
        more = tl.load(beside + at, mask=keep, other=0.0)
        rows_f += tl.where((i >= Q // 2)[None, :], more, 0.0)
        rows_b += tl.where((i < Q // 2)[None, :], more, 0.0)
    f = _direction(
        dt_f + batch * stride_fb, ddt_f + out, rows_f, columns_f, state_sums, state_stride, products, at, at_chunk,
        keep, rate, h, H, place, stride_fl, stride_fh, False, HAS_STATES, SMALLEST,
    )  # fmt: skip
    b = _direction(
        dt_b + batch * stride_bb, ddt_b + out, rows_b, columns_b, state_sums + 2 * state_stride, state_stride,
        products + product_stride,
        at, at_chunk, keep, rate, h, H, place, stride_bl, stride_bh, True, HAS_STATES, SMALLEST,
    )  # fmt: skip
    tl.store(dA + pid * H + h, f + b, mask=h < H)
    if HAS_DIAGONAL:
        d = tl.load(ddiagonals + at, mask=keep, other=0.0)
        tl.store(ddiagonal + out + place[None, :] * H + h[:, None], d.to(ddiagonal.dtype.element_ty), mask=keep)


def step_grads(
    dt_f: Tensor, dt_b: Tensor, A: Tensor, diagonal: Tensor | None, tiles: TileSums, state_sums: Tensor | None,
    products: Tensor | None, Q: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(ddt_f, ddt_b (B, L, H), dA (H,), d diagonal (B, L, H) or None), each in its tensor's dtype."""
    batch, L, H = dt_f.shape
    chunks = triton.cdiv(L, Q)
    ddt_f = torch.empty(dt_f.shape, dtype=dt_f.dtype, device=dt_f.device)
    ddt_b = torch.empty(dt_b.shape, dtype=dt_b.dtype, device=dt_b.device)
    dA = torch.empty(batch * chunks, H, dtype=torch.float32, device=A.device)
    ddiagonal = None if diagonal is None else torch.empty(diagonal.shape, dtype=diagonal.dtype, device=A.device)
    block = min(triton.next_power_of_2(H), BLOCK_HEADS)
    _step_grads_kernel[batch * chunks, triton.cdiv(H, block)](
        dt_f, dt_b, A, tiles.rows, tiles.rows if tiles.beside is None else tiles.beside, tiles.columns,
        tiles.rows if tiles.diagonal is None else tiles.diagonal, tiles.rows if state_sums is None else state_sums,
        tiles.rows if products is None else products, ddt_f, ddt_b, dA, dA if ddiagonal is None else ddiagonal, L, H,
        chunks, 0 if state_sums is None else state_sums.stride(0), 0 if products is None else products.stride(0),
        *dt_f.stride(), *dt_b.stride(), PAIR=tiles.beside is not None, HAS_DIAGONAL=ddiagonal is not None,
        HAS_STATES=state_sums is not None, SMALLEST=SMALLEST_STEP, Q=Q, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
    return ddt_f, ddt_b, dA.sum(0).to(A.dtype), ddiagonal
