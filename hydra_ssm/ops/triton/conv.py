"""Centred depthwise convolution of each document, SiLU, and the diagonal's projection; forward and backward.

A program owns a tile of tokens x channels. A warp has whole rows, a thread neighbouring rows of a few channels: it
loads each once, for all the taps that read it. Tiles at the ends of a row or document mask each tap instead.

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

# The axis of a tile that warps are spread over, of the two that the compiler might take. What it chooses changed; with
# the other one results are the same, and the taps of neighbouring rows share no loads.
AXIS = tl.constexpr(0 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 1)
INNER = tl.constexpr(1 - AXIS.value)  # the rows of a thread


@triton.jit
def _rows(BLOCK_L: tl.constexpr, SHARED: tl.constexpr):
    """Rows of a tile, (SHARED, BLOCK_L / SHARED) or mirrored: SHARED warps have neighbouring rows each."""
    size: tl.constexpr = BLOCK_L // SHARED
    warp = tl.expand_dims(tl.arange(0, SHARED), INNER)
    return warp * size + tl.expand_dims(tl.arange(0, size), AXIS)


@triton.jit
def _channels(start, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr):
    """(1, 1, BLOCK_C) channels, of which a thread gets VECTOR neighbours: so many registers for each parameter."""
    return (start + tl.max_contiguous(tl.arange(0, BLOCK_C), VECTOR))[None, None, :]


@triton.jit
def _one_document(ids, begin, L, HALF: tl.constexpr, BLOCK_L: tl.constexpr, HAS_IDS: tl.constexpr):
    """Whether all taps of the tile at row `begin` reach a row. As most do, they go without masks.

    A document's number belongs to it alone, so that two equal ones have no other between them.
    """
    last = begin + (BLOCK_L + HALF - 1)
    whole = (begin >= HALF) & (last < L)
    if HAS_IDS:
        left = tl.load(ids + tl.maximum(begin - HALF, 0))
        whole = whole & (left >= 0) & (left == tl.load(ids + tl.minimum(last, L - 1)))
    return whole


@triton.jit
def _numbers(ids, r, begin, L, HAS_IDS: tl.constexpr):
    """Document numbers of the tile's rows, -1 past the end of the row."""
    i = begin + r[:, :, None]
    if HAS_IDS:
        return tl.load(ids + i, mask=i < L, other=-1)
    else:
        return tl.where(i < L, 0, -1)


@triton.jit
def _masked_tap(x, stride, ids, own, r, c, keep, begin, L, t, HALF: tl.constexpr, HAS_IDS: tl.constexpr):
    """Rows r + t - HALF of x in float32, zero where the tap t, a number at run time, does not reach."""
    j = r[:, :, None] + (t - HALF)
    there = (begin + j >= 0) & (begin + j < L) & (own >= 0)
    if HAS_IDS:
        there = there & (tl.load(ids + begin + j, mask=there, other=-1) == own)
    return tl.load(x + j * stride + c, mask=there & keep, other=0.0).to(tl.float32)


@triton.jit
def _parameter(pointer, c, keep, SHARED: tl.constexpr):
    """(SHARED, 1, BLOCK_C): laid out over threads as a tile is, so that it need not go through shared memory."""
    zero = tl.expand_dims(tl.zeros([SHARED], tl.int32), INNER)[:, :, None]
    return tl.load(pointer + (c + zero), mask=keep & (zero == 0), other=0.0).to(tl.float32)


@triton.jit
def _projection(weight, start, inner, H, HEADS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(HEADS, BLOCK_C) columns of W_D (H, inner) from start on, zero beyond."""
    h = tl.arange(0, HEADS)
    c = start + tl.arange(0, BLOCK_C)
    mask = (h < H)[:, None] & (c < inner)[None, :]
    return tl.load(weight + h[:, None] * inner + c[None, :], mask=mask, other=0.0)


@triton.jit
def _weighted(
    x, stride, weight, bias, ids, own, r, c, keep, begin, L, C, width, whole,
    WIDTH: tl.constexpr, MIRROR: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The convolution of a tile.

    Without masks a thread loads each of its rows, which are neighbours, once for all taps: the compiler sees that the
    loads are the same. At borders the taps are a loop, which is slow but costs no registers.
    """
    HALF: tl.constexpr = WIDTH // 2
    out = tl.zeros([r.shape[0], r.shape[1], c.shape[2]], tl.float32)
    if HAS_BIAS:
        out += _parameter(bias, c, keep, SHARED)
    if whole:
        for t in tl.static_range(WIDTH):
            values = tl.load(x + (r[:, :, None] + (t - HALF)) * stride + c).to(tl.float32)
            out += values * _parameter(weight + (WIDTH - 1 - t if MIRROR else t) * C, c, keep, SHARED)
    else:
        for t in tl.range(0, width):
            values = _masked_tap(x, stride, ids, own, r, c, keep, begin, L, t, HALF, HAS_IDS)
            out += values * _parameter(weight + (WIDTH - 1 - t if MIRROR else t) * C, c, keep, SHARED)
    return out


@triton.jit
def _add_products(
    sums, g, x, stride, ids, own, r, c, keep, begin, L, width, whole, WIDTH: tl.constexpr, HAS_IDS: tl.constexpr
):
    """sums, one for each tap, and a tile's g times what the tap reads, over the rows of a thread."""
    HALF: tl.constexpr = WIDTH // 2
    if whole:
        more = sums[:0]
        for t in tl.static_range(WIDTH):
            values = tl.load(x + (r[:, :, None] + (t - HALF)) * stride + c).to(tl.float32)
            more = more + (sums[t] + tl.sum(g * values, INNER, keep_dims=True),)  # noqa: RUF005
        sums = more
    else:
        for t in tl.range(0, width):
            values = _masked_tap(x, stride, ids, own, r, c, keep, begin, L, t, HALF, HAS_IDS)
            product = tl.sum(g * values, INNER, keep_dims=True)
            more = sums[:0]
            for k in tl.static_range(WIDTH):
                more = more + (sums[k] + tl.where(t == k, product, 0.0),)  # noqa: RUF005
            sums = more
    return sums


@triton.jit(do_not_specialize=["L", "tiles", "width"])
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
    width,
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
    SHARED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (B tiles parts): parts share a tile's channels, one where there are HEADS to project to."""
    HALF: tl.constexpr = WIDTH // 2
    pid = tl.program_id(0)
    part = pid % parts
    begin = (pid // parts % tiles) * BLOCK_L
    batch = (pid // parts // tiles).to(tl.int64)
    x += batch * stride_xb + begin.to(tl.int64) * stride_xl  # offsets inside a tile fit into 32 bits
    y += batch * stride_yb + begin.to(tl.int64) * stride_yl
    if HAS_IDS:
        ids += batch * L
    r = _rows(BLOCK_L, SHARED)
    own = _numbers(ids, r, begin, L, HAS_IDS)
    one_document = _one_document(ids, begin, L, HALF, BLOCK_L, HAS_IDS)
    if HEADS:
        sums = tl.zeros([BLOCK_L, HEADS], tl.float32)
    for start in tl.range(part * BLOCK_C, C, parts * BLOCK_C):
        start = tl.multiple_of(start, BLOCK_C)
        c = _channels(start, BLOCK_C, VECTOR)
        keep = c < C
        whole = one_document & (start + BLOCK_C <= C)
        out = _weighted(
            x, stride_xl, weight, bias, ids, own, r, c, keep, begin, L, C, width, whole,
            WIDTH, MIRROR, HAS_BIAS, HAS_IDS, SHARED,
        )  # fmt: skip
        if ACTIVATION:
            out *= tl.sigmoid(out)
        if HAS_IDS:
            out = tl.where(own >= 0, out, 0.0)  # the bias
        stored = out.to(y.dtype.element_ty)
        tl.store(y + r[:, :, None] * stride_yl + c, stored, mask=(begin + r < L)[:, :, None] & keep)
        if HEADS and start < inner:
            columns = _projection(head_weight, start, inner, H, HEADS, BLOCK_C).to(stored.dtype)
            values = tl.reshape(tl.where(c < inner, stored, 0.0), [BLOCK_L, BLOCK_C])
            sums = tl.dot(values, tl.trans(columns), sums, input_precision="ieee")
    if HEADS:
        i = tl.reshape(r, [BLOCK_L])
        h = tl.arange(0, HEADS)
        sums += tl.load(head_bias + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        mask = (begin + i < L)[:, None] & (h < H)[None, :]
        tl.store(d + (batch * L + begin) * H + (i[:, None] * H + h[None, :]), sums, mask=mask)


@triton.jit(do_not_specialize=["L", "tiles", "all_tiles", "share", "width"])
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
    width,
    stride_xb,
    stride_xl,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (groups parts): a program has one block of channels of `share` tiles of tokens."""
    HALF: tl.constexpr = WIDTH // 2
    dtype: tl.constexpr = x.dtype.element_ty
    group = tl.program_id(0) // parts
    start = tl.multiple_of(tl.program_id(0) % parts * BLOCK_C, BLOCK_C)
    c = _channels(start, BLOCK_C, VECTOR)
    keep = c < C
    r = _rows(BLOCK_L, SHARED)
    i = tl.reshape(r, [BLOCK_L])
    h = tl.arange(0, HEADS if HEADS else 16)
    if HEADS:
        columns = _projection(head_weight, start, inner, H, HEADS, BLOCK_C).to(dtype)
    # Sums over the rows that a thread has; those of other threads are added after the loop.
    bias_sum = tl.zeros([1 if AXIS else SHARED, SHARED if AXIS else 1, BLOCK_C], tl.float32)
    sums = (bias_sum,) * WIDTH
    first = group * share
    for number in tl.range(first, tl.minimum(first + share, all_tiles)):
        begin = (number % tiles) * BLOCK_L
        batch = (number // tiles).to(tl.int64)
        row = batch * L + begin  # offsets inside a tile fit into 32 bits
        xs = x + (batch * stride_xb + begin.to(tl.int64) * stride_xl)
        own = ids
        if HAS_IDS:
            own += batch * L
        whole = _one_document(own, begin, L, HALF, BLOCK_L, HAS_IDS) & (start + BLOCK_C <= C)
        numbers = _numbers(own, r, begin, L, HAS_IDS)
        pre = _weighted(
            xs, stride_xl, weight, bias, own, numbers, r, c, keep, begin, L, C, width, whole,
            WIDTH, False, HAS_BIAS, HAS_IDS, SHARED,
        )  # fmt: skip
        ds = dy + row * C + (r[:, :, None] * C + c)
        g = tl.load(ds, mask=(numbers >= 0) & keep, other=0.0).to(tl.float32)
        if HEADS and start < inner:
            there = begin + i < L
            if HAS_IDS:
                there = there & (tl.load(own + begin + i, mask=there, other=-1) >= 0)
            at = dd + row * H + (i[:, None] * H + h[None, :])
            heads = tl.load(at, mask=there[:, None] & (h < H)[None, :], other=0.0)
            more = tl.reshape(tl.dot(heads.to(dtype), columns, input_precision="ieee"), g.shape)
            g += tl.where(c < inner, more, 0.0)
        if ACTIVATION:
            gate = tl.sigmoid(pre)
            g *= gate * (1.0 + pre * (1.0 - gate))
        tl.store(ds, g.to(dtype), mask=(begin + r < L)[:, :, None] & keep)
        sums = _add_products(sums, g, xs, stride_xl, own, numbers, r, c, keep, begin, L, width, whole, WIDTH, HAS_IDS)
        bias_sum += tl.sum(g, INNER, keep_dims=True)
    table += group * (WIDTH + HAS_BIAS) * C
    for t in tl.static_range(WIDTH):
        tl.store(table + t * C + c, tl.sum(sums[t], AXIS, keep_dims=True), mask=keep)
    if HAS_BIAS:
        tl.store(table + WIDTH * C + c, tl.sum(bias_sum, AXIS, keep_dims=True), mask=keep)


@dataclass(frozen=True)
class ConvConfig:
    """Tokens and channels of a tile, warps, and the rows of the table that the weight's gradient is summed in."""

    rows: int = 32
    channels: int = 128
    warps: int = 4
    groups: int = 128

    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for: a warp has whole rows, each thread a few channels."""
        vector = max(1, self.channels // 32)
        return {
            "SHARED": self.warps, "VECTOR": vector, "BLOCK_L": self.rows, "BLOCK_C": self.channels,
            "num_warps": self.warps,
        }  # fmt: skip


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
    _gradient_kernel[(groups * parts,)](
        dy, x, taps, taps if bias is None else bias, taps if ids is None else ids.contiguous(), dd, head_weight,
        table, L, C, tiles, batch * tiles, share, parts, inner, H, width, *x.stride()[:2], WIDTH=width,
        ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_IDS=ids is not None, HEADS=_heads(H),
        **config.constants(),
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
        head_bias.contiguous(), y, taps if d is None else d, L, C, tiles, parts, inner, H, len(taps), *x.stride()[:2],
        *y.stride()[:2], WIDTH=len(taps), MIRROR=mirror, ACTIVATION=activation, HAS_BIAS=bias is not None,
        HAS_IDS=ids is not None, HEADS=_heads(H),
        **config.constants(),
    )  # fmt: skip
