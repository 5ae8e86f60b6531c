"""A matrix with its rows and columns exchanged, in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv

BLOCK = 64


@triton.jit
def _transpose_kernel(a, out, rows, columns, stride, BLOCK: tl.constexpr):
    """Grid (columns / BLOCK, rows / BLOCK)."""
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = r[:, None].to(tl.int64) * stride + c[None, :]
    tile = tl.load(a + at, mask=(r < rows)[:, None] & (c < columns)[None, :])
    to = c[:, None].to(tl.int64) * rows + r[None, :]
    tl.store(out + to, tl.trans(tile), mask=(c < columns)[:, None] & (r < rows)[None, :])


def transposed(a: Tensor) -> Tensor:
    """a^T, contiguous, of a (rows, columns) with unit last stride."""
    rows, columns = a.shape
    out = torch.empty((columns, rows), dtype=a.dtype, device=a.device)
    _transpose_kernel[cdiv(columns, BLOCK), cdiv(rows, BLOCK)](a, out, rows, columns, a.stride(0), BLOCK, num_warps=4)
    return out
