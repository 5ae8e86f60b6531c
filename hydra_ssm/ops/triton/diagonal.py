"""The projection W_D x of the diagonal, backwards: one pass over x and its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "share"])
def _diagonal_kernel(
    dd,
    x,
    weight,
    dx,
    table,
    rows,
    share,
    inner,
    H,
    stride_x,
    stride_dx,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (blocks of channels, groups of rows): a program has one block of channels of `share` tiles of rows."""
    group = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.arange(0, HEADS)
    r = tl.arange(0, ROWS)
    has_c = (c < inner)[None, :]
    has_h = h < H
    w = tl.load(weight + h[:, None] * inner + c[None, :], mask=has_h[:, None] & has_c, other=0.0)
    dweight = tl.zeros([HEADS, BLOCK_C], tl.float32)
    first = group.to(tl.int64) * share * ROWS
    for k in tl.range(0, share, num_stages=STAGES):
        begin = first + k * ROWS
        inside = (begin + r < rows)[:, None]
        d = tl.load(dd + begin * H + (r[:, None] * H + h[None, :]), mask=inside & has_h[None, :], other=0.0)
        values = tl.load(x + begin * stride_x + (r[:, None] * stride_x + c[None, :]), mask=inside & has_c, other=0.0)
        to = dx + begin * stride_dx + (r[:, None] * stride_dx + c[None, :])
        grad = tl.load(to, mask=inside & has_c, other=0.0).to(tl.float32)
        grad = tl.dot(d, w, grad, input_precision=PRECISION)
        tl.store(to, grad.to(dx.dtype.element_ty), mask=inside & has_c)
        dweight = tl.dot(tl.trans(d), values, dweight, input_precision=PRECISION)
    at = (group * H + h)[:, None].to(tl.int64) * inner + c[None, :]
    tl.store(table + at, dweight, mask=has_h[:, None] & has_c)


MOST_HEADS = 64  # beyond, a tile of all heads fits badly, and the products of a library are as good


@dataclass(frozen=True)
class DiagonalConfig:
    """Tokens and channels of a tile, groups that tiles are dealt to, stages."""

    rows: int = 64
    channels: int = 64
    groups: int = 22  # with 24 blocks of channels, four programs for each of 132 multiprocessors
    stages: int = 3


def diagonal_backward(dd: Tensor, x: Tensor, weight: Tensor, dx: Tensor, how: DiagonalConfig | None = None) -> Tensor:
    """Adds dd W_D to dx, in place; returns the gradient of W_D (H, inner) in float32.

    dd (rows, H) and W_D are contiguous, x and dx (rows, inner) have unit last strides; all are in the dtype of x.
    """
    how = DiagonalConfig() if how is None else how
    rows, H = dd.shape
    if H > MOST_HEADS:
        dx.addmm_(dd, weight)
        return (dd.T @ x).float()
    inner = x.shape[1]
    tiles = triton.cdiv(rows, how.rows)
    share = triton.cdiv(tiles, how.groups)
    groups = triton.cdiv(tiles, share)
    table = torch.empty(groups, H, inner, dtype=torch.float32, device=x.device)
    heads = max(16, triton.next_power_of_2(H))
    _diagonal_kernel[triton.cdiv(inner, how.channels), groups](
        dd, x, weight, dx, table, rows, share, inner, H, x.stride(0), dx.stride(0), HEADS=heads,
        ROWS=how.rows, BLOCK_C=how.channels, PRECISION="ieee", STAGES=1 if x.dtype == torch.float32 else how.stages,
        num_warps=4,
    )  # fmt: skip
    return table.sum(0)
