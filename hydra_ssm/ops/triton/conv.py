# mypy: disable-error-code="assignment, unreachable, misc"
# (tuples that grow are Triton's, not Python's)
"""Centred depthwise convolution of each document and SiLU: forward and backward, each in one pass over the tokens.

A program owns a few channels of a stretch of tokens and goes through it row by row, with the rows that the taps reach
in registers: each is read once, but for those beside the stretch. The backward pass keeps a second window, of gradients
of the pre-activations, which it finds on the way; the weight's gradient is summed up along the stretch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv
from .sums import column_sums


@triton.jit
def _place(L, C, stretches, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's row of the batch, first token and number of tokens, number of the stretch, and channels."""
    parts = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % parts).to(tl.int32)
    stretch = pid // parts
    first = (stretch % stretches).to(tl.int32) * ROWS
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    return stretch // stretches, first, tl.minimum(ROWS, L - first), stretch, c


@triton.jit
def _taps(weight, c, keep, WIDTH: tl.constexpr):
    taps = ()
    for t in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * WIDTH + t, mask=keep, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _rows_ahead(at, keep, first, end, stride: tl.constexpr, UNROLL: tl.constexpr, begin=None):
    """UNROLL rows, of which the first is at `at` and has that number; zeros before `begin` and from `end` on."""
    rows = ()
    for s in tl.static_range(UNROLL):
        there = first + s < end
        if begin is not None:
            there &= first + s >= begin
        rows = rows + (tl.load(at + s * stride, mask=keep & there, other=0.0),)
    return rows


@triton.jit(do_not_specialize=["L", "stretches"])
def _forward_kernel(
    x,
    weight,
    bias,
    ids,
    y,
    L,
    stretches,
    stride_b,
    C: tl.constexpr,
    stride_l: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid (B stretches blocks of channels)."""
    HALF: tl.constexpr = WIDTH // 2
    batch, first, count, _, c = _place(L, C, stretches, ROWS, BLOCK_C)
    keep = c < C
    x += batch * stride_b + first.to(tl.int64) * stride_l  # offsets inside a stretch fit into 32 bits
    y += (batch * L + first) * C
    ids += batch * L + first
    low, high = -first, L - first
    taps = _taps(weight, c, keep, WIDTH)
    start = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + c, mask=keep, other=0.0).to(tl.float32)
    window = ()
    numbers = ()
    for k in tl.static_range(WIDTH - 1):
        there = (k - HALF >= low) & (k - HALF < high)
        row = tl.load(x + (k - HALF) * stride_l + c, mask=keep & there, other=0.0)
        window = window + (row.to(tl.float32),)
        if HAS_IDS:
            numbers = numbers + (tl.load(ids + (k - HALF), mask=there, other=-2),)
    entering, leaving = x + HALF * stride_l + c, y + c
    read = _rows_ahead(entering, keep, HALF, high, stride_l, UNROLL)
    for k in tl.range(0, count, UNROLL):
        rows = read
        entering += UNROLL * stride_l
        read = _rows_ahead(entering, keep & (k + UNROLL < count), k + UNROLL + HALF, high, stride_l, UNROLL)
        for s in tl.static_range(UNROLL):
            window = window + (rows[s].to(tl.float32),)
            if HAS_IDS:
                j = k + s + HALF
                numbers = numbers + (tl.load(ids + j, mask=j < high, other=-2),)
            out = start
            for t in tl.static_range(WIDTH):
                if HAS_IDS:
                    out += tl.where(numbers[t] == numbers[HALF], window[t], 0.0) * taps[t]
                else:
                    out += window[t] * taps[t]
            if ACTIVATION:
                out *= tl.sigmoid(out)
            if HAS_IDS:
                out = tl.where(numbers[HALF] >= 0, out, 0.0)
                numbers = numbers[1:]
            tl.store(leaving + s * C, out.to(y.dtype.element_ty), mask=keep & (k + s < count))
            window = window[1:]
        leaving += UNROLL * C


@triton.jit(do_not_specialize=["L", "stretches"])
def _halo_kernel(
    x,
    halo,
    L,
    stretches,
    stride_b,
    C: tl.constexpr,
    stride_l: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copies the 2 HALF rows before and the 2 HALF rows after each stretch. Grid as forward, of its own BLOCK_C."""
    batch, first, count, stretch, c = _place(L, C, stretches, ROWS, BLOCK_C)
    keep = c < C
    x += batch * stride_b
    rows = ()  # all are on their way before one is stored: no load is moved over that
    for k in tl.static_range(4 * HALF):
        i = first + (k - 2 * HALF if k < 2 * HALF else count + k - 2 * HALF)
        rows = rows + (tl.load(x + i.to(tl.int64) * stride_l + c, mask=keep & (i >= 0) & (i < L), other=0.0),)
    for k in tl.static_range(4 * HALF):
        tl.store(halo + (stretch * (4 * HALF) + k) * stride_l + c, rows[k], mask=keep)


@triton.jit(do_not_specialize=["L", "stretches"])
def _backward_kernel(
    dy,
    x,
    weight,
    bias,
    ids,
    halo,
    dx,
    table,
    L,
    stretches,
    stride_b,
    stride_db,
    C: tl.constexpr,
    stride_l: tl.constexpr,
    stride_dl: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid as forward. At step k: x enters at row k, g at row k - HALF, dx leaves at row k - 2 HALF of the stretch.

    In place, what lies beside the stretch may be overwritten already: it is read from its copy, the halo.
    """
    HALF: tl.constexpr = WIDTH // 2
    batch, first, count, stretch, c = _place(L, C, stretches, ROWS, BLOCK_C)
    keep = c < C
    x += batch * stride_b + first.to(tl.int64) * stride_l  # offsets inside a stretch fit into 32 bits
    dx += batch * stride_db + first.to(tl.int64) * stride_dl
    dy += (batch * L + first) * C
    ids += batch * L + first
    low, high = -first, L - first
    taps = _taps(weight, c, keep, WIDTH)
    zero = tl.zeros([BLOCK_C], tl.float32)
    start = zero
    if HAS_BIAS:
        start += tl.load(bias + c, mask=keep, other=0.0).to(tl.float32)
    window = ()
    grads = ()
    numbers = ()
    sums = (zero,) * (WIDTH + 1)
    for k in tl.static_range(WIDTH - 1):
        there = keep & (k - 2 * HALF >= low)
        if IN_PLACE:
            row = tl.load(halo + (stretch * (4 * HALF) + k) * stride_l + c, mask=there, other=0.0)
        else:
            row = tl.load(x + (k - 2 * HALF) * stride_l + c, mask=there, other=0.0)
        window = window + (row.to(tl.float32),)
        grads = grads + (zero,)
    if HAS_IDS:
        for k in tl.static_range(3 * HALF):
            numbers = numbers + (tl.load(ids + (k - 3 * HALF), mask=k - 3 * HALF >= low, other=-2),)
    after = halo + (stretch * (4 * HALF) + 2 * HALF) * stride_l + c
    entering, gradients, leaving = x + c, dy - HALF * C + c, dx - 2 * HALF * stride_dl + c
    end = count + 2 * HALF
    read = _rows_ahead(entering, keep, 0, tl.minimum(high, end), stride_l, UNROLL)
    given = _rows_ahead(gradients, keep, -HALF, tl.minimum(high, count + HALF), C, UNROLL, low)
    for k in tl.range(0, end, UNROLL):
        rows = read
        own_given = given
        entering += UNROLL * stride_l
        if IN_PLACE:  # a shorter stretch has nothing after it
            entering = tl.where(k + UNROLL == ROWS, after, entering)
        gradients += UNROLL * C
        read = _rows_ahead(entering, keep, k + UNROLL, tl.minimum(high, end), stride_l, UNROLL)
        given = _rows_ahead(gradients, keep, k + UNROLL - HALF, tl.minimum(high, count + HALF), C, UNROLL, low)
        for s in tl.static_range(UNROLL):
            j = k + s
            if HAS_IDS:
                numbers = numbers + (tl.load(ids + j, mask=j < high, other=-2),)
                own_number = tl.where(numbers[2 * HALF] >= 0, numbers[2 * HALF], -9)  # padding reaches nothing
            reached = ()
            window = window + (rows[s].to(tl.float32),)
            pre = start
            for t in tl.static_range(WIDTH):
                if HAS_IDS:
                    reached = reached + (tl.where(numbers[HALF + t] == own_number, window[t], 0.0),)
                else:
                    reached = reached + (window[t],)
                pre += reached[t] * taps[t]
            g = own_given[s].to(tl.float32)
            if ACTIVATION:
                sigmoid = tl.sigmoid(pre)
                g *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
            if HAS_IDS:
                g = tl.where(own_number >= 0, g, 0.0)
            grads = grads + (g,)
            own = tl.where((j >= HALF) & (j - HALF < count), g, 0.0)
            more = ()
            for t in tl.static_range(WIDTH):
                more = more + (sums[t] + own * reached[t],)
            sums = more + (sums[WIDTH] + own,)
            out = zero
            for t in tl.static_range(WIDTH):
                if HAS_IDS:
                    out += tl.where(numbers[2 * HALF - t] == numbers[HALF], grads[2 * HALF - t], 0.0) * taps[t]
                else:
                    out += grads[2 * HALF - t] * taps[t]
            i = j - 2 * HALF
            tl.store(leaving + s * stride_dl, out.to(dx.dtype.element_ty), mask=keep & (i >= 0) & (i < count))
            window = window[1:]
            grads = grads[1:]
            if HAS_IDS:
                numbers = numbers[1:]
        leaving += UNROLL * stride_dl
    table += stretch * ((WIDTH + HAS_BIAS) * C)
    for t in tl.static_range(WIDTH):
        tl.store(table + c * WIDTH + t, sums[t], mask=keep)
    if HAS_BIAS:
        tl.store(table + WIDTH * C + c, sums[WIDTH], mask=keep)


@dataclass(frozen=True)
class ConvConfig:
    """Tokens of a stretch, channels of a program, rows that are loaded at once, warps."""

    rows: int = 32
    channels: int = 128
    unroll: int = 8
    warps: int = 2

    def __post_init__(self) -> None:
        if self.rows % self.unroll:
            raise ValueError(f"a stretch must be a multiple of {self.unroll} rows, got {self.rows}")


FORWARD = ConvConfig()
BACKWARD = ConvConfig(rows=256, channels=64, warps=1)
HALO = 256  # channels of a program that copies what lies beside a stretch


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool, how: ConvConfig = FORWARD
) -> Tensor:
    """y_i = SiLU(sum_t w_t x_{i + t - W // 2} + bias), (B, L, C), contiguous, in the dtype of x.

    Args:
        x: (B, L, C), any strides but unit last. What it holds at padding is not used.
        weight: (C, 1, W), W odd, and bias (C,), of any floating point dtype.
        ids: (B, L) document numbers, -1 for padding, where y is zero. None: each row is a document.
        activation: whether there is the SiLU.
    """
    batch, L, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stretches = cdiv(L, how.rows)
    _forward_kernel[(batch * stretches * cdiv(C, how.channels),)](
        x, weight, weight if bias is None else bias, x if ids is None else ids, y, L, stretches,
        x.stride(0), C, x.stride(1), WIDTH=weight.shape[-1], ACTIVATION=activation, HAS_BIAS=bias is not None,
        HAS_IDS=ids is not None, ROWS=how.rows, BLOCK_C=how.channels, UNROLL=how.unroll, num_warps=how.warps,
    )  # fmt: skip
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool, dx: Tensor,
    how: ConvConfig = BACKWARD,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Writes dx (B, L, C), any strides but unit last, which may be x itself; returns dweight and dbias in their dtypes.

    dy (B, L, C) is contiguous; the rest as in conv_forward.
    """
    batch, L, C = x.shape
    width, stretches = weight.shape[-1], cdiv(L, how.rows)
    grid = (batch * stretches * cdiv(C, how.channels),)
    # A row that is one stretch has nothing beside it; within a stretch, what is written is read no more.
    in_place, halo = stretches > 1 and dx.data_ptr() == x.data_ptr(), x
    if in_place:
        # Rows as far apart as those of x: a step goes from one to the other by its pointer alone.
        halo = torch.empty(batch * stretches, 4 * (width // 2), x.stride(1), dtype=x.dtype, device=x.device)
        _halo_kernel[(batch * stretches * cdiv(C, HALO),)](
            x, halo, L, stretches, x.stride(0), C, x.stride(1), HALF=width // 2, ROWS=how.rows, BLOCK_C=HALO,
            num_warps=4,
        )  # fmt: skip
    table = torch.empty(batch * stretches, (width + (bias is not None)) * C, dtype=torch.float32, device=x.device)
    _backward_kernel[grid](
        dy, x, weight, weight if bias is None else bias, x if ids is None else ids, halo, dx, table, L, stretches,
        x.stride(0), dx.stride(0), C, x.stride(1), dx.stride(1), WIDTH=width, ACTIVATION=activation,
        HAS_BIAS=bias is not None, HAS_IDS=ids is not None, IN_PLACE=in_place, ROWS=how.rows, BLOCK_C=how.channels,
        UNROLL=how.unroll, num_warps=how.warps,
    )  # fmt: skip
    dweight, dbias = column_sums(table, width * C, weight.dtype, None if bias is None else bias.dtype)
    return dweight.view(weight.shape), None if bias is None else dbias
