"""The gated RMS norm on a GPU: one read of each operand, forward and backward.

    out = y rstd w SiLU(z),   rstd = (mean y^2 + eps)^(-1/2)

With n = y rstd, s = sigmoid(z) and g the gradient of out:

    dw = sum g n z s      dz = g n w s (1 + z (1 - s))      dy = rstd (d - n mean(d n)),  d = g w z s

Where y = M x + diagonal x, the backward pass can give dy . x of each head as well, the diagonal's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import WIDEST_NORM
from .sizes import cdiv, next_power_of_2
from .sums import column_sums

MOST_WARPS = 16
LARGEST_STAGE = 8192  # bytes of each operand that are loaded ahead


@triton.jit
def _rows_of(tile, rows, L, stride_b, stride_l, ROWS: tl.constexpr, D: tl.constexpr):
    """Of a tile's rows, each (ROWS, 1): number, whether it exists, its place where packed and in a strided view."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    batch, place = (row // L).to(tl.int64), (row % L).to(tl.int64)
    return row, row < rows, row.to(tl.int64) * D, batch * stride_b + place * stride_l


@triton.jit(do_not_specialize=["rows", "L"])
def _norm_forward_kernel(
    y, z, weight, out, rstd, rows, L, stride_b, stride_l, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, exists, packed, strided = _rows_of(tile, rows, L, stride_b, stride_l, ROWS, D)
        keep = exists & (c < D)
        values = tl.load(y + packed + c, mask=keep, other=0.0).to(tl.float32)
        gate = tl.load(z + strided + c, mask=keep, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, 1, keep_dims=True) / D + eps)
        tl.store(rstd + row, scale, mask=exists)
        normed = values * scale * w * gate * tl.sigmoid(gate)
        tl.store(out + packed + c, normed.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "L"])
def _norm_backward_kernel(
    dout, y, z, weight, rstd, x, dy, dz, ddiagonal, table, rows, L, stride_b, stride_l, stride_db, stride_dl,
    stride_x, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # In place, a tile is read before it is written: every element belongs to one thread, as tiles have more of them
    # than a program has threads, and no other tile shares it.
    c = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    if P:
        heads: tl.constexpr = BLOCK // P
        h = tl.arange(0, heads)[None, :]
        of_heads = tl.zeros((ROWS, heads), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row, exists, packed, strided = _rows_of(tile, rows, L, stride_b, stride_l, ROWS, D)
        _, _, _, to = _rows_of(tile, rows, L, stride_db, stride_dl, ROWS, D)
        keep = exists & (c < D)
        grad = tl.load(dout + packed + c, mask=keep, other=0.0).to(tl.float32)
        gate = tl.load(z + strided + c, mask=keep, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=exists, other=0.0)
        n = tl.load(y + packed + c, mask=keep, other=0.0).to(tl.float32) * scale
        if P:  # before anything is stored: no load is moved over a store
            xs = tl.load(x + row.to(tl.int64) * stride_x + c, mask=keep, other=0.0)
        s = tl.sigmoid(gate)
        d = grad * gate * s
        dw += d * n
        d *= w
        dgate = grad * n * w * s * (1.0 + gate * (1.0 - s))
        dvalues = scale * (d - n * (tl.sum(d * n, 1, keep_dims=True) / D))
        tl.store(dz + to + c, dgate.to(dz.dtype.element_ty), mask=keep)
        dvalues = dvalues.to(dy.dtype.element_ty)
        tl.store(dy + packed + c, dvalues, mask=keep)
        if P:
            along = tl.sum(tl.reshape(dvalues.to(tl.float32) * xs.to(tl.float32), (ROWS, heads, P)), 2)
            of_heads += along
            to = ddiagonal + row.to(tl.int64) * (D // P) + h
            tl.store(to, along.to(ddiagonal.dtype.element_ty), mask=exists & (h < D // P))
    c = tl.arange(0, BLOCK)
    table += tl.program_id(0).to(tl.int64) * (D + D // P if P else D)
    tl.store(table + c, tl.sum(dw, 0), mask=c < D)
    if P:
        h = tl.arange(0, heads)
        tl.store(table + D + h, tl.sum(of_heads, 0), mask=h < D // P)


@dataclass(frozen=True)
class NormConfig:
    """Elements of a tile of whole rows (one row where it is wider), programs that share the tiles, warps, stages."""

    elements: int = 2048
    programs: int = 1 << 30  # no more than there are tiles
    warps: int = 4
    stages: int = 1

    def launch(self, rows: int, D: int, itemsize: int) -> tuple[int, dict[str, int]]:
        """The grid and the kernel's constants for rows of D numbers of so many bytes."""
        block = next_power_of_2(D)
        per_tile = max(1, self.elements // block)
        stages = self.stages if per_tile * block * itemsize <= LARGEST_STAGE else 1
        warps = min(MOST_WARPS, max(1, per_tile * block // self.elements) * self.warps)
        constants = {"D": D, "BLOCK": block, "ROWS": per_tile, "STAGES": stages, "num_warps": warps}
        return min(self.programs, cdiv(rows, per_tile)), constants


FORWARD = NormConfig()
BACKWARD = NormConfig(programs=528)
WITH_DIAGONAL = NormConfig(programs=264, stages=3)


def norm_forward(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, how: NormConfig = FORWARD, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, rstd): out (B, L, D) in y's dtype, rstd (B, L) float32. Given, out is contiguous and may be y.

    y (B, L, D) is contiguous, z (B, L, D) may be a strided view with unit last stride, weight is (D,) of any dtype.
    """
    _check(y.shape, (y,), (z,))
    batch, L, D = y.shape
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device) if out is None else out
    rstd = torch.empty(batch, L, dtype=torch.float32, device=y.device)
    grid, constants = how.launch(batch * L, D, y.itemsize)
    _norm_forward_kernel[(grid,)](y, z, weight, out, rstd, batch * L, L, *z.stride()[:2], eps, **constants)
    return out, rstd


class NormGrads(NamedTuple):
    """What a backward pass returns."""

    weight: Tensor  # (D,) in its dtype
    diagonal: Tensor | None  # (B, L, H) dy . x of each head, in the dtype of x
    diagonal_sum: Tensor | None  # (H,) the same over batch and tokens, float32


def norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor, dz: Tensor, x: Tensor | None = None,
    how: NormConfig | None = None,
) -> NormGrads:  # fmt: skip
    """Writes dy and dz (B, L, D), which may be y and z themselves.

    dout, y and dy are contiguous, z and dz strided views with unit last stride. x (B, L, H, P), H P = D and P a power
    of two, has its tokens at equal distances, each contiguous; with it the gradients of a diagonal are found.
    """
    _check(y.shape, (dout, y, dy), (z, dz))
    batch, L, D = y.shape
    how = how or (BACKWARD if x is None else WITH_DIAGONAL)
    grid, constants = how.launch(batch * L, D, y.itemsize)
    H, P = (0, 0) if x is None else x.shape[2:]
    table = torch.empty(grid, D + H, dtype=torch.float32, device=y.device)
    apart = 0 if x is None else x.stride(1 if L > 1 else 0)
    ddiagonal = None if x is None else torch.empty(x.shape[:3], dtype=x.dtype, device=x.device)
    _norm_backward_kernel[(grid,)](
        dout, y, z, weight, rstd, y if x is None else x, dy, dz, dy if ddiagonal is None else ddiagonal, table,
        batch * L, L, *z.stride()[:2], *dz.stride()[:2], apart, P=P, **constants,
    )  # fmt: skip
    dweight, diagonal_sum = column_sums(table, D, weight.dtype, torch.float32)
    return NormGrads(dweight, ddiagonal, None if x is None else diagonal_sum)


def _check(shape: torch.Size, packed: tuple[Tensor, ...], strided: tuple[Tensor, ...]) -> None:
    if shape[-1] > WIDEST_NORM:
        raise ValueError(f"rows of the gated norm must be at most {WIDEST_NORM} wide, got {shape[-1]}")
    for t in (*packed, *strided):
        if t.shape != shape:
            raise ValueError(f"operands of the gated norm must be {tuple(shape)} as y, got {tuple(t.shape)}")
    if not all(t.is_contiguous() for t in packed) or not all(t.stride(-1) == 1 for t in strided):
        raise ValueError(
            "y and gradients of it must be contiguous, z and its gradient along the last axis, got strides "
            + ", ".join(str(t.stride()) for t in (*packed, *strided))
        )
