"""Step sizes and log-decays of both directions, transposed and summed within chunks: what every other kernel reads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def _decay_kernel(
    dt_f,
    dt_b,
    A,
    sums,
    steps,
    L,
    H,
    chunks,
    stride_fb,
    stride_fl,
    stride_fh,
    stride_bb,
    stride_bl,
    stride_bh,
    direction_stride,
    LOG2: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    batch, chunk = pid // chunks, pid % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    place = chunk * Q + tl.arange(0, Q)
    inside = (place < L)[:, None] & (h < H)[None, :]
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * LOG2
    to = (batch * H + h)[None, :] * (chunks * Q) + place[:, None]
    keep = (h < H)[None, :] & (place >= 0)[:, None]
    dt = tl.load(dt_f + batch * stride_fb + place[:, None] * stride_fl + h[None, :] * stride_fh, mask=inside, other=0.0)
    dt = dt.to(tl.float32)
    tl.store(steps + to, dt, mask=keep)
    tl.store(sums + to, tl.cumsum(dt * rate[None, :], 0), mask=keep)
    dt = tl.load(dt_b + batch * stride_bb + place[:, None] * stride_bl + h[None, :] * stride_bh, mask=inside, other=0.0)
    dt = dt.to(tl.float32)
    tl.store(steps + direction_stride + to, dt, mask=keep)
    tl.store(sums + direction_stride + to, tl.cumsum(dt * rate[None, :], 0, reverse=True), mask=keep)


def decay_sums(dt_f: Tensor, dt_b: Tensor, A: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """(sums, steps), each (2, B, H, L rounded up to Q) float32: log2-decays summed in reading order within chunks, and dt.

    Position 0 of the first axis is the causal direction. Both are zero-padded: past the end dt is zero.
    """
    batch, L, H = dt_f.shape
    chunks = triton.cdiv(L, Q)
    sums = torch.empty(2, batch, H, chunks * Q, dtype=torch.float32, device=dt_f.device)
    steps = torch.empty_like(sums)
    block = min(triton.next_power_of_2(H), 8)
    _decay_kernel[(batch * chunks, triton.cdiv(H, block))](
        dt_f, dt_b, A, sums, steps, L, H, chunks, *dt_f.stride(), *dt_b.stride(), sums.stride(0),
        LOG2=LOG2E, Q=Q, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
    return sums, steps
