"""What kernels of the product load of a chunk, in either direction.

Their loops over heads keep a bound that the compiler does not know where there is one head alone. Without a loop ptxas
12.8, which triton 3.6 and 3.7 bring, computes addresses of narrow operands (N or P of 16 or 32) from registers that
nothing was written to; ptxas 12.9 does not. benchmarks/gpu/registers.py looks for such code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_features(u, i, begin, limit, chunk, stride, n, shift):
    """Features of the tokens i + shift of a chunk: their own, or a neighbour's (a shifted row's C); 0 past the ends."""
    there = i + shift
    exists = (i < limit) & (there < limit) & ((there >= 0) | (chunk > 0))
    at = u + (begin + shift) * stride + (i[:, None] * stride + n[None, :])
    return tl.load(at, mask=exists[:, None], other=0.0)


@triton.jit
def load_borders(ids, limit, chunk, direction, Q: tl.constexpr):
    """Documents of the token that is read before a chunk at `ids`, and of the chunk's token that is read last."""
    forward = direction == 0
    before = tl.load(ids + tl.where(forward, -1, Q), mask=tl.where(forward, chunk > 0, limit > Q), other=-2)
    last = tl.load(ids + tl.where(forward, tl.minimum(limit, Q) - 1, 0))
    return before, last
