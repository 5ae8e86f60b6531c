"""What kernels of the product load of a chunk, in either direction.

Their loops over heads keep a bound that the compiler does not know where there is one head alone. Without a loop ptxas
12.8, which triton 3.6 and 3.7 bring, computes addresses of narrow operands (N or P of 16 or 32) from registers that
nothing was written to; ptxas 12.9 does not. benchmarks/gpu/registers.py looks for such code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_features(u, i, begin, limit, chunk, stride, n, DIRECTION: tl.constexpr, NEIGHBOUR: tl.constexpr):
    """Features of the tokens i of a chunk: their own, or those of the neighbour that was read before (a row's C)."""
    shift = 0
    exists = i < limit
    if NEIGHBOUR:
        shift = 2 * DIRECTION - 1
        if DIRECTION == 0:
            exists = ((i > 0) | (chunk > 0)) & (i < limit)
        else:
            exists = i + 1 < limit
    at = u + (begin + shift) * stride + (i[:, None] * stride + n[None, :])
    return tl.load(at, mask=exists[:, None], other=0.0)


@triton.jit
def load_borders(ids, limit, chunk, DIRECTION: tl.constexpr, Q: tl.constexpr):
    """Documents of the token that is read before a chunk at `ids`, and of the chunk's token that is read last."""
    if DIRECTION == 0:
        before = tl.load(ids - 1, mask=chunk > 0, other=-2)
        last = tl.load(ids + tl.minimum(limit, Q) - 1)
    else:
        before = tl.load(ids + Q, mask=limit > Q, other=-2)
        last = tl.load(ids)
    return before, last
