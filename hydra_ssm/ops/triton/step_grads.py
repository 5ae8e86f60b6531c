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
from .feature_grads import StateSums
from .sizes import cdiv, next_power_of_2
from .sums import column_sums
from .value_grads import TileSums

BLOCK_HEADS = 8


@triton.jit
def _direction(
    step, rows, columns, earlier, product, whole, exists, rate, bias, low, high,
    REVERSE: tl.constexpr, RAW: tl.constexpr, HAS_STATES: tl.constexpr, SMALLEST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """ddt, its sum over the tokens and sum dt da, of each head. Tiles are (heads, tokens).

    rows: sums of the rows that read up to a token. columns: as da takes them, whole: as ddt does. earlier: Cst of the
    token before, in this direction.
    """
    da = tl.cumsum(rows - columns, 1, reverse=not REVERSE)
    if HAS_STATES:
        da += tl.cumsum(earlier, 1, reverse=REVERSE) + product
    step, slope = final_steps(step, bias, low, high, exists, RAW)
    # Where nothing passes a token its da is zero; what the sums leave of it is rounding, and A may be large.
    da = tl.where(step * rate < -MOST, 0.0, da)
    grad = (whole / tl.where(step < SMALLEST, SMALLEST, step) + rate * da) * slope
    return grad, tl.sum(grad, 1), tl.sum(step * da, 1)


@triton.jit(do_not_specialize=["L", "chunks", "A_stride"])
def _step_grads_kernel(
    dt_f,
    dt_b,
    A,
    bias,
    ids,
    tiles,
    beside,
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
    """Grid (B chunks, H / BLOCK_H). All is loaded before anything is summed: no load is moved over a sum's barriers."""
    pid = tl.program_id(0).to(tl.int64)
    batch, chunk = pid // chunks, pid % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    place = chunk * Q + i
    at = (batch * H + h)[:, None] * (chunks * Q) + place[None, :]
    at_chunk = (batch * H + h) * chunks + chunk
    keep = (h < H)[:, None] & (place < L)[None, :]
    before = keep & (i > 0)[None, :]
    after = keep & ((i < Q - 1) & (place + 1 < L))[None, :]
    read_f = after if SHIFTED else keep
    read_b = before if SHIFTED else keep
    step_f = tl.load(
        dt_f + batch * stride_fb + place[None, :] * stride_fl + h[:, None] * stride_fh, mask=keep, other=0.0
    )
    step_b = tl.load(
        dt_b + batch * stride_bb + place[None, :] * stride_bl + h[:, None] * stride_bh, mask=keep, other=0.0
    )
    earlier_f = 0.0
    earlier_b = 0.0
    product_f = 0.0
    product_b = 0.0
    if HAS_STATES:
        along_f = tl.load(state_sums + at + SHIFTED, mask=read_f, other=0.0)
        along_b = tl.load(state_sums + 2 * state_stride.to(tl.int64) + at - SHIFTED, mask=read_b, other=0.0)
        through_f = state_sums + state_stride + at
        through_b = state_sums + 3 * state_stride.to(tl.int64) + at
        earlier_f = tl.load(through_f - 1, mask=before, other=0.0)
        earlier_b = tl.load(through_b + 1, mask=after, other=0.0)
        through_f = tl.load(through_f, mask=keep, other=0.0)
        through_b = tl.load(through_b, mask=keep, other=0.0)
    if PAIR:
        beside_f = tl.load(beside + at + SHIFTED, mask=read_f & (i + SHIFTED >= Q // 2)[None, :], other=0.0)
        beside_b = tl.load(beside + at - SHIFTED, mask=read_b & (i - SHIFTED < Q // 2)[None, :], other=0.0)
    tiles += at_chunk[:, None] * (4 * Q) + i[None, :]
    rows_f = tl.load(tiles + SHIFTED, mask=read_f, other=0.0)
    rows_b = tl.load(tiles + (Q - SHIFTED), mask=read_b, other=0.0)
    columns_f = tl.load(tiles + 2 * Q, mask=keep, other=0.0)
    columns_b = tl.load(tiles + 3 * Q, mask=keep, other=0.0)
    whole_f = columns_f
    whole_b = columns_b
    if NEAR:
        nears += at_chunk[:, None] * (2 * Q) + i[None, :]
        whole_f += tl.load(nears, mask=keep, other=0.0)
        whole_b += tl.load(nears + Q, mask=keep, other=0.0)
    if PAIR:
        rows_f += beside_f
        rows_b += beside_b
    own = h[:, None]  # numbers of a head are columns: their layout is that of the tiles
    rate_f = load_rates(A, own, H, RAW)
    rate_b = load_rates(A + A_stride, own, H, RAW)
    exists = keep
    offset = 0.0
    if RAW:
        offset = tl.load(bias + own, mask=own < H, other=0.0).to(tl.float32)
        if HAS_IDS:
            exists &= tl.load(ids + batch * L + place[None, :], mask=(place < L)[None, :], other=-1) >= 0
    if HAS_STATES:
        product_f = tl.load(products + at_chunk[:, None], mask=own < H, other=0.0)
        product_b = tl.load(products + product_stride + at_chunk[:, None], mask=own < H, other=0.0)
        rows_f += along_f
        rows_b += along_b
        whole_f += through_f
        whole_b += through_b
    grad_f, raw_f, dA_f = _direction(
        step_f, rows_f, columns_f, earlier_f, product_f, whole_f, exists, rate_f, offset, low, high,
        False, RAW, HAS_STATES, SMALLEST, MOST,
    )  # fmt: skip
    grad_b, raw_b, dA_b = _direction(
        step_b, rows_b, columns_b, earlier_b, product_b, whole_b, exists, rate_b, offset, low, high,
        True, RAW, HAS_STATES, SMALLEST, MOST,
    )  # fmt: skip
    to = ddt_f + batch * out_stride_fb + place[None, :] * out_stride_fl + h[:, None] * out_stride_fh
    tl.store(to, grad_f.to(ddt_f.dtype.element_ty), mask=keep)
    to = ddt_b + batch * out_stride_bb + place[None, :] * out_stride_bl + h[:, None] * out_stride_bh
    tl.store(to, grad_b.to(ddt_b.dtype.element_ty), mask=keep)
    if RAW:
        dA_f *= tl.sum(rate_f, 1)
        dA_b *= tl.sum(rate_b, 1)
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

    def summed(self, steps: Steps) -> tuple[Tensor, Tensor | None]:
        """dA and dbias, in their tensors' dtypes."""
        A, bias = steps.A, steps.bias
        dA, dbias = column_sums(self.sums.flatten(0, 1), A.numel(), A.dtype, None if bias is None else bias.dtype)
        return dA.view(A.shape), None if bias is None else dbias


def step_grads(
    steps: Steps, ids: Tensor | None, tiles: TileSums, of_states: StateSums | None, Q: int, to: StepGrads,
    shifted: bool = True,
) -> None:  # fmt: skip
    """Writes the gradients; of_states is None where one chunk holds everything."""
    dt_f, dt_b, A, bias = steps.dt_f, steps.dt_b, steps.A, steps.bias
    batch, L, H = dt_f.shape
    along, products = (tiles.sums, tiles.sums) if of_states is None else of_states
    block = min(next_power_of_2(H), BLOCK_HEADS)
    _step_grads_kernel[batch * cdiv(L, Q), cdiv(H, block)](
        dt_f, dt_b, A, A if bias is None else bias, dt_f if ids is None else ids,
        tiles.sums, tiles.sums if tiles.beside is None else tiles.beside,
        tiles.sums if tiles.near is None else tiles.near,
        tiles.sums if tiles.diagonal is None else tiles.diagonal, along, products, to.ddt_f, to.ddt_b, to.sums,
        to.sums if to.ddiagonal is None else to.ddiagonal, L, H, cdiv(L, Q), steps.A_stride,
        *steps.limits, along.stride(0), products.stride(0),
        *dt_f.stride(), *dt_b.stride(), *to.ddt_f.stride(), *to.ddt_b.stride(), SHARED=int(A.ndim == 1),
        SHIFTED=int(shifted), RAW=bias is not None, HAS_IDS=ids is not None, PAIR=tiles.beside is not None,
        NEAR=tiles.near is not None, HAS_DIAGONAL=to.ddiagonal is not None, HAS_STATES=of_states is not None,
        SMALLEST=SMALLEST_STEP, MOST=STRONGEST / LOG2E, Q=Q, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
