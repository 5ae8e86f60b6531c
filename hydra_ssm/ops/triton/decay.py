"""Log-decays of both directions, summed within chunks and transposed: what every other kernel reads.

Four numbers a token and head, side by side: (row_f, row_b, column_f, column_b), all log2. From column token j to row i
of a chunk the decay exp(a_{j+1} + ... + a_{i-1}) is 2 ** (row_i - column_j); rows that are not shifted go on to a_i.
For 16-bit products the step dt_j is part of the column (folded); float32 keeps it apart, so that neighbours, whose
decay is 1, lose nothing to long sums, and beside it what rounding took from the sums: strong decays add up to
thousands, which differ little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .sizes import cdiv, next_power_of_2

LOG2E = 1.4426950408889634
SMALLEST_STEP = 2.0**-100  # what dt = 0 counts as: it adds nothing, and gradients may divide by it
STRONGEST = 152.0  # log2: 2 ** -152 is zero, and a larger one would cost the sums that pass it their digits


@triton.jit
def load_decays(decays, i, STRIDE: tl.constexpr = 4):
    """(row_f, row_b, column_f, column_b) of the tokens i, each of the shape of i."""
    Q: tl.constexpr = i.shape[0]
    # One load of 4 Q numbers: split into four, the compiler would repeat them in every warp.
    four = tl.load(decays + i[:, None] * STRIDE + tl.arange(0, 4)[None, :])
    f, b = tl.split(tl.reshape(four, [Q, 2, 2]))
    row_f, column_f = tl.split(f)
    row_b, column_b = tl.split(b)
    return row_f, row_b, column_f, column_b


@triton.jit
def load_steps(steps, i):
    """(dt_f, dt_b) of the tokens i."""
    return tl.split(tl.load(steps + i[:, None] * 8 + tl.arange(0, 2)[None, :]))


@triton.jit
def load_rests(steps, i):
    """What rounding took from the sums of the tokens i, in the order of load_decays."""
    return load_decays(steps + 4, i, 8)


@triton.jit
def load_weights(column_f, column_b, total_f, total_b, steps, i, FOLDED: tl.constexpr):
    """dt 2^(total - column) of both directions: what the tokens i bring to the state that leaves their chunk."""
    if FOLDED:
        weight_f = tl.exp2(total_f - column_f)
        weight_b = tl.exp2(total_b - column_b)
    else:
        weight_f, weight_b = tl.split(tl.load(steps + i[:, None] * 8 + (2 + tl.arange(0, 2))[None, :]))
    return weight_f, weight_b


@triton.jit
def final_steps(raw, bias, low, high, exists, RAW: tl.constexpr):
    """(dt, d dt / d raw) float32: softplus, clamped, 0 where there is no token; dt itself where it is not RAW."""
    v = raw.to(tl.float32)
    slope = tl.full(v.shape, 1.0, tl.float32)
    if RAW:
        # Comparisons with what may be NaN leave it in place.
        v += bias
        e = tl.exp(-tl.abs(v))
        slope = tl.where(v < 0.0, e, 1.0) / (1.0 + e)
        # log(1 + e) = 2 artanh(s) by its series, s <= 1/3: a GPU's logarithm near 1 is exact to 1e-7 of 1, not of e.
        s = e / (2.0 + e)
        z = s * s
        series = 1.0 / 9.0 + z * (1.0 / 11.0 + z * (1.0 / 13.0 + z * (1.0 / 15.0)))
        series = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * series)))
        v = tl.where(v < 0.0, 0.0, v) + 2.0 * s * series
        slope = tl.where(exists & (v >= low) & (v <= high), slope, 0.0)
        v = tl.where(v < low, low, tl.where(v > high, high, v))
        v = tl.where(exists, v, 0.0)
    return v, slope


@triton.jit
def load_rates(A, h, H, RAW: tl.constexpr):
    """A of the heads h, float32; A_log is given where it is RAW."""
    rate = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32)
    return -tl.exp(rate) if RAW else rate


@triton.jit
def _rows(sums, i, DIRECTION: tl.constexpr, SHIFTED: tl.constexpr):
    """A shifted row's sum stops at its neighbour, whose column has that very number: a gather keeps its digits."""
    rows = sums
    if SHIFTED:
        Q: tl.constexpr = sums.shape[0]
        if DIRECTION == 0:
            neighbour = tl.maximum(i - 1, 0)
            has = i > 0
        else:
            neighbour = tl.minimum(i + 1, Q - 1)
            has = i < Q - 1
        rows = tl.where(has[:, None], tl.gather(sums, tl.broadcast_to(neighbour[:, None], sums.shape), 0), 0.0)
    return rows


@triton.jit
def _four(a, b, c, d):
    """(heads, tokens, 4) of four (tokens, heads) in the order (a, c, b, d)."""
    four = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.permute(tl.reshape(four, [a.shape[0], a.shape[1], 4]), (1, 0, 2))


@triton.jit
def _projected(
    x, weight, offset, i, limit, h, H, inner, stride, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr
):
    """weight x + offset, float32 (tokens, heads), of the tokens i of the chunk at x."""
    k = tl.arange(0, BLOCK)
    found = tl.zeros([i.shape[0], h.shape[0]], tl.float32)
    for start in tl.range(0, inner, BLOCK, num_stages=STAGES):
        at = start + k
        exists = (at < inner)[None, :]
        v = tl.load(x + i[:, None] * stride + at[None, :], mask=(i < limit)[:, None] & exists, other=0.0)
        w = tl.load(weight + h[:, None] * inner + at[None, :], mask=(h < H)[:, None] & exists, other=0.0)
        found = tl.dot(v, tl.trans(w.to(v.dtype)), found, input_precision=PRECISION)
    return found + tl.load(offset + h, mask=h < H, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["L", "chunks", "A_stride"])
def _decay_kernel(
    dt_f,
    dt_b,
    A,
    bias,
    ids,
    diagonal,
    weight,
    offset,
    decays,
    steps,
    totals,
    diagonals,
    L,
    H,
    chunks,
    inner,
    A_stride,
    low,
    high,
    stride_fb,
    stride_fl,
    stride_fh,
    stride_bb,
    stride_bl,
    stride_bh,
    stride_db,
    stride_dl,
    stride_dh,
    RAW: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    PROJECTED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SHIFTED: tl.constexpr,
    FOLDED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2: tl.constexpr,
    SMALLEST: tl.constexpr,
    MOST: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B chunks, H / BLOCK_H). diagonal is x where the diagonal is a projection of it.

    All but a projection is loaded before anything is stored or summed: no load is moved over that.
    """
    pid = tl.program_id(0).to(tl.int64)
    batch, chunk = pid // chunks, pid % chunks
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    place = chunk * Q + i
    inside = (place < L)[:, None] & (h < H)[None, :]
    head = batch * H + h
    to = head[:, None] * (chunks * Q) + place[None, :]
    f = tl.load(dt_f + batch * stride_fb + place[:, None] * stride_fl + h[None, :] * stride_fh, mask=inside, other=0.0)
    b = tl.load(dt_b + batch * stride_bb + place[:, None] * stride_bl + h[None, :] * stride_bh, mask=inside, other=0.0)
    exists = inside
    raised = 0.0
    if RAW:
        raised = tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        if HAS_IDS:
            exists &= (tl.load(ids + batch * L + place, mask=place < L, other=-1) >= 0)[:, None]
    rate_f = load_rates(A, h, H, RAW)
    rate_b = load_rates(A + A_stride, h, H, RAW)
    if HAS_DIAGONAL:
        diagonal += batch * stride_db
        if PROJECTED:
            x = diagonal + chunk * Q * stride_dl
            d = _projected(x, weight, offset, i, L - chunk * Q, h, H, inner, stride_dl, BLOCK_K, STAGES, PRECISION)
        else:
            at = diagonal + place[:, None] * stride_dl + h[None, :] * stride_dh
            d = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            if HAS_OFFSET:
                d += tl.load(offset + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        tl.store(diagonals + to, tl.trans(d), mask=tl.broadcast_to((h < H)[:, None], (BLOCK_H, Q)))
    f, _ = final_steps(f, raised, low, high, exists, RAW)
    b, _ = final_steps(b, raised, low, high, exists, RAW)
    f = tl.where(f < SMALLEST, SMALLEST, f)
    b = tl.where(b < SMALLEST, SMALLEST, b)
    a_f = f * (rate_f * LOG2)[None, :]
    a_b = b * (rate_b * LOG2)[None, :]
    a_f = tl.where(a_f < -MOST, -MOST, a_f)
    a_b = tl.where(a_b < -MOST, -MOST, a_b)
    keep = tl.broadcast_to((h < H)[:, None], (BLOCK_H, Q))[:, :, None]
    if FOLDED:
        sum_f = tl.cumsum(a_f, 0)
        sum_b = tl.cumsum(a_b, 0, reverse=True)
        total_f = tl.sum(tl.where((i == Q - 1)[:, None], sum_f, 0.0), 0)
        total_b = tl.sum(tl.where((i == 0)[:, None], sum_b, 0.0), 0)
        four = _four(_rows(sum_f, i, 0, SHIFTED), sum_f - tl.log2(f), _rows(sum_b, i, 1, SHIFTED), sum_b - tl.log2(b))
    else:
        exact_f = tl.cumsum(a_f.to(tl.float64), 0)
        exact_b = tl.cumsum(a_b.to(tl.float64), 0, reverse=True)
        exact_total_f = tl.sum(tl.where((i == Q - 1)[:, None], exact_f, 0.0), 0)
        exact_total_b = tl.sum(tl.where((i == 0)[:, None], exact_b, 0.0), 0)
        total_f = exact_total_f.to(tl.float32)
        total_b = exact_total_b.to(tl.float32)
        sum_f = exact_f.to(tl.float32)
        sum_b = exact_b.to(tl.float32)
        four = _four(_rows(sum_f, i, 0, SHIFTED), sum_f, _rows(sum_b, i, 1, SHIFTED), sum_b)
        rest_f = (exact_f - sum_f.to(tl.float64)).to(tl.float32)
        rest_b = (exact_b - sum_b.to(tl.float64)).to(tl.float32)
        rests = _four(_rows(rest_f, i, 0, SHIFTED), rest_f, _rows(rest_b, i, 1, SHIFTED), rest_b)
        weight_f = f * tl.exp2((exact_total_f[None, :] - exact_f).to(tl.float32))
        weight_b = b * tl.exp2((exact_total_b[None, :] - exact_b).to(tl.float32))
        at = to[:, :, None] * 8 + tl.arange(0, 4)[None, None, :]
        tl.store(steps + at, _four(f, weight_f, b, weight_b), mask=keep)
        tl.store(steps + 4 + at, rests, mask=keep)
    here = head * chunks + chunk
    tl.store(totals + here * 2, total_f, mask=h < H)
    tl.store(totals + here * 2 + 1, total_b, mask=h < H)
    tl.store(decays + to[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], four, mask=keep)


class Steps(NamedTuple):
    """dt and A of both directions, as the product takes them.

    Without a bias they are final. With one they are raw: dt = clamp(softplus(raw + bias), *limits), zero where ids < 0,
    and A holds A_log, A = -exp(A_log); the kernels find them in float32, again in the backward pass.
    """

    dt_f: Tensor  # (B, L, H), any strides
    dt_b: Tensor
    A: Tensor  # (H,), or (2, H): causal, anticausal
    bias: Tensor | None = None  # (H,)
    limits: tuple[float, float] = (0.0, math.inf)

    @property
    def A_stride(self) -> int:
        """From the causal A to the anticausal one."""
        return 0 if self.A.ndim == 1 else self.A.shape[1]


class Decays(NamedTuple):
    """Per chunk of Q tokens, float32: what the kernels read of dt, A and the diagonal."""

    sums: Tensor  # (B, H, L', 4), L' = chunks Q: past the end dt is zero
    steps: Tensor | None  # (B, H, L', 8): dt, dt 2^(total - column), the sums' rests; None where folded into columns
    totals: Tensor  # (B, H, chunks, 2) the chunks' whole log2-decays, causal and anticausal
    diagonal: Tensor | None  # (B, H, L')
    shifted: bool = True  # rows read what their neighbour has read: with its C, up to its own step

    def of(self, rows: slice) -> Decays:
        """Those of some rows of the batch."""
        steps, diagonal = (None if t is None else t[rows] for t in (self.steps, self.diagonal))
        return Decays(self.sums[rows], steps, self.totals[rows], diagonal, self.shifted)


class Projection(NamedTuple):
    """The diagonal (B, L, H) as weight x + offset."""

    x: Tensor  # (B, L, K), the last stride unit
    weight: Tensor  # (H, K)
    offset: Tensor  # (H,)
    product: Tensor | None = None  # (B, L, H) weight x, in the dtype of x, if it is known

    def multiplied(self) -> Projection:
        """It with the product, by a kernel of its own: faster than with the decays where there is much to read.

        The weight is in the dtype of x then.
        """
        weight = self.weight.to(self.x.dtype)
        return self._replace(weight=weight, product=F.linear(self.x, weight))


@dataclass(frozen=True)
class DecaysConfig:
    """Heads of a program; numbers of x that a projection reads at once, and how far ahead; warps."""

    heads: int = 8
    values: int = 64
    stages: int = 1
    warps: int = 4


GIVEN = DecaysConfig(heads=2, warps=1)
PROJECTED = DecaysConfig(heads=2, values=128, stages=3)  # for few tokens: many programs, each of which reads all of x


def chunk_decays(
    steps: Steps, ids: Tensor | None, diagonal: Tensor | Projection | None, Q: int, folded: bool, shifted: bool = True,
    precision: str = "ieee",
) -> Decays:  # fmt: skip
    """The decays of the steps, and the diagonal (B, L, H) beside them; ids (B, L) matter to raw steps alone."""
    dt_f, dt_b, A, bias = steps.dt_f, steps.dt_b, steps.A, steps.bias
    batch, L, H = dt_f.shape
    chunks = cdiv(L, Q)

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, H, *shape, dtype=torch.float32, device=dt_f.device)

    sums, totals = empty(chunks * Q, 4), empty(chunks, 2)
    apart = None if folded else empty(chunks * Q, 8)
    diagonals = None if diagonal is None else empty(chunks * Q)
    given: Tensor | None
    if isinstance(diagonal, Projection):
        weight, offset, projected = diagonal.weight, diagonal.offset, diagonal.product is None
        given = diagonal.x if projected else diagonal.product
    else:
        given, weight, offset, projected = diagonal, None, None, False
    config = PROJECTED if projected else GIVEN
    block = min(next_power_of_2(H), config.heads)
    _decay_kernel[(batch * chunks, cdiv(H, block))](
        dt_f, dt_b, A, *(dt_f if t is None else t for t in (bias, ids, given, weight, offset)),
        sums, sums if apart is None else apart, totals, sums if diagonals is None else diagonals,
        L, H, chunks, 0 if weight is None else weight.shape[1], steps.A_stride, *steps.limits,
        *dt_f.stride(), *dt_b.stride(), *((0, 0, 0) if given is None else given.stride()),
        RAW=bias is not None, HAS_IDS=ids is not None, HAS_DIAGONAL=given is not None, PROJECTED=projected,
        HAS_OFFSET=offset is not None, SHIFTED=shifted, FOLDED=folded, PRECISION=precision, LOG2=LOG2E,
        SMALLEST=SMALLEST_STEP, MOST=STRONGEST, Q=Q, BLOCK_H=block, BLOCK_K=config.values, STAGES=config.stages,
        num_warps=config.warps,
    )  # fmt: skip
    return Decays(sums, apart, totals, diagonals, shifted)
