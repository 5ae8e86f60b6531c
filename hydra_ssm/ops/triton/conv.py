"""Centred depthwise convolution of each document, SiLU, and the diagonal's projection; forward and backward.

A program owns a tile of tokens x channels and reads it once a tap, shifted: the first read comes from memory, the
others from the nearest cache. Which taps a token has (row's ends, documents, padding) is found once, as bits.

The projection is part of the same kernel: its program owns tokens and loops over all channels, and multiplies each
block with the block's columns of W_D while it is in registers. A kernel of its own would read all of y again, which is
more than the caches hold, for a thousandth of the arithmetic of a projection; sums over channels in other programs
would have to be written, and added up.

Backward is two kernels. The first finds the pre-activations again and turns dy into their gradient g, and sums the
weight's gradient over many tiles of tokens, one row of a small table for each program. The second is the convolution
of g with the mirrored weight; a program cannot do both, as it has not the rows of g beside its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _reach(ids, r, before, after, WIDTH: tl.constexpr, HAS_IDS: tl.constexpr):
    """Bit t of each row r of a tile: whether its tap t is in the row of the batch, and in the same document.

    Rows -before <= r < after exist around the tile; ids points to the tile's first.
    """
    HALF: tl.constexpr = WIDTH // 2
    bits = tl.zeros(r.shape, tl.int32)
    if HAS_IDS:
        own = tl.load(ids + r, mask=r < after, other=-1)
    for t in tl.static_range(WIDTH):
        j = r + (t - HALF)
        there = (j >= -before) & (j < after) & (r < after)
        if HAS_IDS:
            there = there & (own >= 0) & (tl.load(ids + j, mask=there, other=-1) == own)
        bits = bits | (there.to(tl.int32) << t)
    return bits


@triton.jit
def _tap(xs, stride, r, c, keep, bits, t: tl.constexpr, HALF: tl.constexpr):
    """Rows r + t - HALF of x in its dtype, zero where the tap does not reach."""
    mask = (((bits >> t) & 1) != 0)[:, None] & keep[None, :]
    return tl.load(xs + (r + (t - HALF))[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def _parameter(pointer, c, keep):
    return tl.load(pointer + c, mask=keep, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _projection(weight, start, inner, H, HEADS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(HEADS, BLOCK_C) columns of W_D (H, inner) from start on, zero beyond."""
    h = tl.arange(0, HEADS)
    c = start + tl.arange(0, BLOCK_C)
    mask = (h < H)[:, None] & (c < inner)[None, :]
    return tl.load(weight + h[:, None] * inner + c[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["L", "tiles"])
def _conv_kernel(
    x,
    weight,
    bias,
    ids,
    head_weight,
    head_bias,
    y,
    d,
    L,
    C,
    tiles,
    parts,
    inner,
    H,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    WIDTH: tl.constexpr,
    MIRROR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (B tiles parts): parts share a tile's channels, one where there are HEADS to project to."""
    HALF: tl.constexpr = WIDTH // 2
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % parts).to(tl.int32)
    tile = pid // parts % tiles
    batch = pid // parts // tiles
    begin = tile * BLOCK_L  # offsets inside a tile fit into 32 bits
    r = tl.arange(0, BLOCK_L)
    before = tl.minimum(begin, HALF).to(tl.int32)
    after = tl.minimum(L - begin, BLOCK_L + HALF).to(tl.int32)
    bits = _reach(ids + batch * L + begin, r, before, after, WIDTH, HAS_IDS)
    x += batch * stride_xb + begin * stride_xl
    y += batch * stride_yb + begin * stride_yl
    if HEADS:
        sums = tl.zeros([BLOCK_L, HEADS], tl.float32)
    for start in tl.range(part * BLOCK_C, C, parts * BLOCK_C):
        start = tl.multiple_of(start, BLOCK_C)
        c = start + tl.arange(0, BLOCK_C)
        keep = c < C
        out = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
        if HAS_BIAS:
            out += _parameter(bias, c, keep)
        for t in tl.static_range(WIDTH):
            values = _tap(x, stride_xl, r, c, keep, bits, WIDTH - 1 - t if MIRROR else t, HALF)
            out += values.to(tl.float32) * _parameter(weight + t * C, c, keep)
        if ACTIVATION:
            out *= tl.sigmoid(out)
        if HAS_IDS:
            out = tl.where(((bits >> HALF) & 1 != 0)[:, None], out, 0.0)  # the bias
        stored = out.to(y.dtype.element_ty)
        tl.store(y + r[:, None] * stride_yl + c[None, :], stored, mask=(r < after)[:, None] & keep[None, :])
        if HEADS:
            if start < inner:
                columns = _projection(head_weight, start, inner, H, HEADS, BLOCK_C).to(stored.dtype)
                values = tl.where((c < inner)[None, :], stored, 0.0)
                sums = tl.dot(values, tl.trans(columns), sums, input_precision="ieee")
    if HEADS:
        h = tl.arange(0, HEADS)
        sums += tl.load(head_bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        mask = (r < after)[:, None] & (h < H)[None, :]
        tl.store(d + (batch * L + begin) * H + (r[:, None] * H + h[None, :]), sums, mask=mask)


@triton.jit(do_not_specialize=["L", "tiles", "all_tiles", "share"])
def _gradient_kernel(
    dy,
    x,
    weight,
    bias,
    ids,
    dd,
    head_weight,
    table,
    L,
    C,
    tiles,
    all_tiles,
    share,
    parts,
    inner,
    H,
    stride_xb,
    stride_xl,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HEADS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (groups parts): a program has one block of channels of `share` tiles of tokens."""
    HALF: tl.constexpr = WIDTH // 2
    dtype: tl.constexpr = x.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    group = pid // parts
    start = (pid % parts).to(tl.int32) * BLOCK_C
    c = start + tl.arange(0, BLOCK_C)
    keep = c < C
    r = tl.arange(0, BLOCK_L)
    if HEADS:
        h = tl.arange(0, HEADS)
        columns = _projection(head_weight, start, inner, H, HEADS, BLOCK_C).to(dtype)
    # Sums over the rows that a thread has; those of other threads are added after the loop.
    sums = ()
    for _ in tl.static_range(WIDTH + HAS_BIAS):
        sums = sums + (tl.zeros([KEEP, BLOCK_C], tl.float32),)
    first = group * share
    for number in tl.range(first, tl.minimum(first + share, all_tiles)):
        batch = number // tiles
        begin = (number % tiles) * BLOCK_L  # offsets inside a tile fit into 32 bits
        before = tl.minimum(begin, HALF).to(tl.int32)
        after = tl.minimum(L - begin, BLOCK_L + HALF).to(tl.int32)
        bits = _reach(ids + batch * L + begin, r, before, after, WIDTH, HAS_IDS)
        own = ((bits >> HALF) & 1) != 0
        xs = x + (batch * stride_xb + begin * stride_xl)
        taps = ()
        for t in tl.static_range(WIDTH):
            taps = taps + (_tap(xs, stride_xl, r, c, keep, bits, t, HALF),)
        ds = dy + (batch * L + begin) * C + (r[:, None] * C + c[None, :])
        g = tl.load(ds, mask=own[:, None] & keep[None, :], other=0.0).to(tl.float32)
        if HEADS:
            if start < inner:
                mask = own[:, None] & (h < H)[None, :]
                heads = tl.load(dd + (batch * L + begin) * H + (r[:, None] * H + h[None, :]), mask=mask, other=0.0)
                more = tl.dot(heads.to(dtype), columns, input_precision="ieee")
                g += tl.where((c < inner)[None, :], more, 0.0)
        if ACTIVATION:
            pre = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
            if HAS_BIAS:
                pre += _parameter(bias, c, keep)
            for t in tl.static_range(WIDTH):
                pre += taps[t].to(tl.float32) * _parameter(weight + t * C, c, keep)
            gate = tl.sigmoid(pre)
            g *= gate * (1.0 + pre * (1.0 - gate))
        tl.store(ds, g.to(dtype), mask=(r < after)[:, None] & keep[None, :])
        more_sums = ()
        for t in tl.static_range(WIDTH + HAS_BIAS):
            product = g * taps[t].to(tl.float32) if t < WIDTH else g
            folded = tl.sum(tl.reshape(product, [BLOCK_L // KEEP, KEEP, BLOCK_C]), 0)
            more_sums = more_sums + (sums[t] + folded,)
        sums = more_sums
    table += group * (WIDTH + HAS_BIAS) * C
    for t in tl.static_range(WIDTH + HAS_BIAS):
        tl.store(table + t * C + c, tl.sum(sums[t], 0), mask=keep)


@dataclass(frozen=True)
class ConvConfig:
    """Tokens and channels of a tile, warps, and the rows of the table that the weight's gradient is summed in."""

    rows: int = 32
    channels: int = 128
    warps: int = 4
    groups: int = 128


@dataclass(frozen=True)
class ConvPlan:
    """The configuration of each kernel."""

    forward: ConvConfig = ConvConfig()
    diagonal: ConvConfig = ConvConfig()  # of the forward kernel where it has a diagonal to find
    gradient: ConvConfig = ConvConfig(rows=16)
    mirrored: ConvConfig = ConvConfig()


PLAN = ConvPlan()


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool,
    diagonal: tuple[Tensor, Tensor] | None = None, how: ConvPlan = PLAN,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y_i = SiLU(sum_t w_t x_{i + t - W // 2} + bias) and, of y, the diagonal d.

    Args:
        x: (B, L, C), any strides but unit last. What it holds at padding is not read.
        weight: (C, 1, W), W odd, and bias (C,), of any floating point dtype.
        ids: (B, L) document numbers, -1 for padding, where y is zero. None: each row is a document.
        activation: whether there is the SiLU.
        diagonal: W_D (H, inner) and D (H,).

    Returns:
        y (B, L, C), contiguous, in the dtype of x; d (B, L, H) = W_D y[:inner] + D in float32, of y as it is stored.
    """
    batch, L, _ = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if diagonal is None:
        _convolve(x, _by_tap(weight), bias, ids, y, None, None, activation, False, how.forward)
        return y, None
    d = torch.empty(batch, L, len(diagonal[1]), dtype=torch.float32, device=x.device)
    _convolve(x, _by_tap(weight), bias, ids, y, diagonal, d, activation, False, how.diagonal)
    return y, d


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool, dx: Tensor,
    diagonal: tuple[Tensor, Tensor] | None = None, how: ConvPlan = PLAN,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of conv_forward; dx goes into its buffer, dy (B, L, C), contiguous, is used up.

    Args:
        dx: (B, L, C), any strides but unit last; may be the memory of x.
        diagonal: the gradient (B, L, H) of d in float32, and W_D. The gradients of W_D and D are the caller's.

    Returns:
        dweight (C, 1, W) and dbias (C,) in the dtypes of weight and bias.
    """
    config, taps = how.gradient, _by_tap(weight)
    batch, L, C = x.shape
    width = len(taps)
    parts, tiles = triton.cdiv(C, config.channels), triton.cdiv(L, config.rows)
    share = triton.cdiv(batch * tiles, config.groups)
    groups = triton.cdiv(batch * tiles, share)
    table = torch.empty(groups, width + (bias is not None), C, dtype=torch.float32, device=x.device)
    dd, head_weight = (dy, dy) if diagonal is None else (diagonal[0].contiguous(), diagonal[1].contiguous())
    H, inner = (0, 0) if diagonal is None else head_weight.shape
    threads = config.warps * 32 * (16 // x.element_size())  # values that all threads have with one load
    _gradient_kernel[(groups * parts,)](
        dy, x, taps, taps if bias is None else bias, taps if ids is None else ids.contiguous(), dd, head_weight,
        table, L, C, tiles, batch * tiles, share, parts, inner, H, *x.stride()[:2], WIDTH=width,
        ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_IDS=ids is not None, HEADS=_heads(H),
        KEEP=min(config.rows, max(1, threads // config.channels)), BLOCK_L=config.rows, BLOCK_C=config.channels,
        num_warps=config.warps,
    )  # fmt: skip
    _convolve(dy, taps, None, ids, dx, None, None, False, True, how.mirrored)
    sums = table.sum(0)
    dweight = sums[:width].T.unsqueeze(1).to(weight.dtype, memory_format=torch.contiguous_format)
    return dweight, None if bias is None else sums[width].to(bias.dtype)


def _by_tap(weight: Tensor) -> Tensor:
    """(W, C): neighbouring channels side by side, as the kernels read them."""
    return weight.detach()[:, 0].T.contiguous()


def _heads(H: int) -> int:
    """What the matrix units want of H columns; none for none."""
    return max(16, triton.next_power_of_2(H)) if H else 0


def _convolve(
    x: Tensor, taps: Tensor, bias: Tensor | None, ids: Tensor | None, y: Tensor,
    diagonal: tuple[Tensor, Tensor] | None, d: Tensor | None, activation: bool, mirror: bool, config: ConvConfig,
) -> None:  # fmt: skip
    batch, L, C = x.shape
    H, inner = (0, 0) if diagonal is None else diagonal[0].shape
    head_weight, head_bias = (taps, taps) if diagonal is None else diagonal
    tiles = triton.cdiv(L, config.rows)
    parts = 1 if H else triton.cdiv(C, config.channels)
    _conv_kernel[(batch * tiles * parts,)](
        x, taps, taps if bias is None else bias, taps if ids is None else ids.contiguous(), head_weight.contiguous(),
        head_bias.contiguous(), y, taps if d is None else d, L, C, tiles, parts, inner, H, *x.stride()[:2],
        *y.stride()[:2], WIDTH=len(taps), MIRROR=mirror, ACTIVATION=activation, HAS_BIAS=bias is not None,
        HAS_IDS=ids is not None, HEADS=_heads(H), BLOCK_L=config.rows, BLOCK_C=config.channels,
        num_warps=config.warps,
    )  # fmt: skip
