"""Sums of what programs have left in a table, each in a row of its own: without atomics, the same bits in any run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

BLOCK, MOST_ROWS = 32, 256  # columns of a program, rows that it reads at once


@triton.jit(do_not_specialize=["rows"])
def _sums_kernel(table, first, second, rows, width, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (columns / BLOCK): those before `width` go to `first`."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        at = (start + r)[:, None].to(tl.int64) * columns + c[None, :]
        sums += tl.load(table + at, mask=((start + r) < rows)[:, None] & (c < columns)[None, :], other=0.0)
    total = tl.sum(sums, 0)
    tl.store(first + c, total.to(first.dtype.element_ty), mask=c < width)
    tl.store(second + (c - width), total.to(second.dtype.element_ty), mask=(c >= width) & (c < columns))


def column_sums(
    table: Tensor, width: int, dtype: torch.dtype, other: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of the columns of a float32 table: the first `width`, in dtype, and those beside them, in the other."""
    rows, columns = table.shape[0], table.shape[1:].numel()
    first = torch.empty((width,), dtype=dtype, device=table.device)
    second = torch.empty((columns - width,), dtype=other or dtype, device=table.device)
    _sums_kernel[(cdiv(columns, BLOCK),)](
        table, first, second if columns > width else first, rows, width, columns,
        ROWS=min(MOST_ROWS, next_power_of_2(rows)), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return first, second
