"""Orders in which the cells of a grid are read: a grid of any number of axes, any of them any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from ..ops import Order

Grid = tuple[int, ...]
Step = tuple[int, int]
Key = tuple[str, Grid, int, torch.device]


def row(grid: Grid) -> Tensor:
    """Row-major: the last axis runs fastest."""
    return _numbered(grid).flatten()


def column(grid: Grid) -> Tensor:
    """Column-major: the first axis runs fastest."""
    return _numbered(grid).permute(*reversed(range(len(grid)))).flatten()


def snake(grid: Grid) -> Tensor:
    """Row-major, but every other line runs back: what follows in the order is a neighbour in the grid."""
    cells = _numbered(grid)
    for axis in reversed(range(1, len(grid))):  # what lies within a step of axis - 1 runs back at every other one
        odd = torch.arange(grid[axis - 1]) % 2 == 1
        turned = cells.flip(tuple(range(axis, len(grid))))
        cells = torch.where(odd.reshape(-1, *(1,) * (len(grid) - axis)), turned, cells)
    return cells.flatten()


def hilbert(grid: Grid) -> Tensor:
    """Hilbert's curve: what is near in the order is near in the grid, along every axis.

    Two axes: a curve for any rectangle. Each step goes to a neighbour, but for one to a diagonal one where the longer
    side is odd and the shorter one even. More axes: the curve of the smallest cube of side 2^n that holds the grid,
    without the cells outside of it, so that it jumps where the grid is not that cube.
    """
    if len(grid) == 2:
        h, w = grid
        long, short = ((0, w), (h, 0)) if w >= h else ((h, 0), (0, w))
        cells = torch.tensor(list(_curve((0, 0), long, short)))
        return cells[:, 0] * w + cells[:, 1]
    bits = max(1, (max(grid) - 1).bit_length())
    cells = torch.tensor(list(product(*map(range, grid)))).reshape(-1, len(grid))
    return torch.argsort(_hilbert_number(cells, bits))


ORDERS: dict[str, Callable[[Grid], Tensor]] = {"row": row, "column": column, "snake": snake, "hilbert": hilbert}
MOST_MADE = 256  # orders that are kept; of pictures of more sizes the oldest are made anew
_MADE: dict[Key, tuple[Order, ...]] = {}
_CAPTURED: set[Key] = set()  # CUDA graphs read these where they lie, for as long as the process lives: never freed


def parse(order: str) -> list[list[str]]:
    """The orders that the layers take in turn, each one or several to be summed: "row,column", "row+column".

    Raises:
        ValueError: a name is unknown.
    """
    found = [[name.strip() for name in one.split("+")] for one in order.split(",")]
    wrong = [name for one in found for name in one if name not in ORDERS]
    if wrong:
        raise ValueError(
            f"order must be of {', '.join(ORDERS)}, joined by + (summed) and by , (layers in turn), got {order!r}"
        )
    return found


def places(order: str, grid: Grid, prefix: int = 0) -> list[Tensor]:
    """What the encoder takes for `order`: for each layer in turn, (orders, 1, cells) places of the cells.

    Args:
        order: see `parse`.
        grid: cells along each axis, such as (height, width); the tokens stand in row-major order.
        prefix: tokens before those of the grid, which are read before them.
    """
    if not grid or min(grid) < 1:
        raise ValueError(f"grid must have at least one axis and a cell, got {grid}")
    first = torch.arange(prefix)
    return [
        torch.stack([torch.cat([first, ORDERS[name](grid) + prefix]) for name in names])[:, None]
        for names in parse(order)
    ]


def reading(
    order: str, grid: Sequence[int], prefix: int = 0, device: torch.device | str = "cpu"
) -> tuple[Order, ...] | None:
    """`places`, checked and on a device, kept for the next call; None for row-major order, in which tokens stand."""
    if order == "row":
        return None
    key = (order, tuple(int(n) for n in grid), prefix, torch.device(device))
    if torch.compiler.is_compiling():
        return _MADE.get(key) or tuple(Order.of(t.to(device)) for t in places(order, key[1], prefix))
    if key not in _MADE:
        if len(_MADE) - len(_CAPTURED) >= MOST_MADE:
            del _MADE[next(old for old in _MADE if old not in _CAPTURED)]  # the oldest
        with torch.inference_mode(False):  # what is evaluated with first may be trained with later
            _MADE[key] = tuple(Order.of(t.to(device)) for t in places(order, key[1], prefix))
    if _is_captured(key[3]):
        _CAPTURED.add(key)
    return _MADE[key]


def _is_captured(device: torch.device) -> bool:
    """Whether what runs on the device now is becoming a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _numbered(grid: Grid) -> Tensor:
    count = 1
    for n in grid:
        count *= n
    return torch.arange(count).reshape(grid)


def _curve(at: Step, along: Step, across: Step) -> Iterator[Step]:
    """Cells of the rectangle that two vectors along the axes span from a corner, from there to the end of `along`.

    A long one is halved. Else three parts: up a half of `across`, along all of the upper half, and down again.
    """
    width, height = abs(sum(along)), abs(sum(across))
    to_right, up = _unit(along), _unit(across)
    if height == 1 or width == 1:
        for n in range(width * height):
            yield _plus(at, to_right if height == 1 else up, n)
        return
    half, rise = _half(along), _half(across)
    if 2 * width > 3 * height:
        if abs(sum(half)) % 2 and width > 2:
            half = _plus(half, to_right)
        yield from _curve(at, half, across)
        yield from _curve(_plus(at, half), _plus(along, half, -1), across)
        return
    if abs(sum(rise)) % 2 and height > 2:
        rise = _plus(rise, up)
    yield from _curve(at, rise, half)
    yield from _curve(_plus(at, rise), along, _plus(across, rise, -1))
    end = _plus(_plus(_plus(at, along), to_right, -1), _plus(rise, up, -1))
    yield from _curve(end, _plus((0, 0), rise, -1), _plus(half, along, -1))


def _plus(first: Step, second: Step, times: int = 1) -> Step:
    return first[0] + times * second[0], first[1] + times * second[1]


def _half(step: Step) -> Step:
    return int(step[0] / 2), int(step[1] / 2)


def _unit(step: Step) -> Step:
    return (step[0] > 0) - (step[0] < 0), (step[1] > 0) - (step[1] < 0)


def _hilbert_number(cells: Tensor, bits: int) -> Tensor:
    """(n,) places on Hilbert's curve of cells (n, axes) of a cube of side 2^bits: Skilling's transform."""
    x = list(cells.unbind(1))
    for b in reversed(range(1, bits)):
        low = (1 << b) - 1
        for i in range(len(x)):
            on = (x[i] >> b & 1).bool()
            exchanged = (x[0] ^ x[i]) & low
            x[0] = torch.where(on, x[0] ^ low, x[0] ^ exchanged)
            if i:
                x[i] = torch.where(on, x[i], x[i] ^ exchanged)
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    turn = torch.zeros_like(x[0])
    for b in reversed(range(1, bits)):
        turn = torch.where((x[-1] >> b & 1).bool(), turn ^ ((1 << b) - 1), turn)
    number = torch.zeros_like(x[0])
    for b in reversed(range(bits)):
        for axis in x:
            number = number << 1 | ((axis ^ turn) >> b & 1)
    return number
