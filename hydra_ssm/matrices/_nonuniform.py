"""Products with the matrix sum_d cos(w q_id j) - cos(w k_jd i), whatever its angles: a non-uniform FFT."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._autograd import closed_form, without_autocast
from ._cosines import cosines, rank
from ._fft import fast_length
from ._parts import AT_ONCE, IN_CACHE, on_cpu

LITTLE = 4.0  # an angle at the last token, halved


def any_cosines(q: Tensor, k: Tensor, x: Tensor, turns: float, tolerance: float) -> Tensor:
    """y_i = sum_jd (cos(w q_id j) - cos(w k_jd i)) x_j, w = 2 pi turns, differentiable once.

    q and k (n, L, d), x (n, L, P), all float32 or float64. Time O(n L P (d log(1 / tolerance) + log L)), the same
    operations whatever q and k hold. Angles up to `LITTLE` are left to `cosines`: beside a cosine near 1 the errors of
    a Fourier transform are large.
    """
    little = LITTLE / (math.pi * turns * max(x.shape[1] - 1, 1))
    rows, columns = q.abs() <= little, k.abs() <= little
    near = cosines(q.where(rows, 0), k.where(columns, 0), x, 2 * math.pi * turns, rank(LITTLE, tolerance))
    far = _AnyCosines.apply(q, k, ~rows, ~columns, x, turns, _Grid.of(x.shape[1], tolerance))
    ones = x.sum(1, keepdim=True) * (~rows).sum(2, keepdim=True)  # `near` is of cosines less 1
    return near + far - ones + (x * (~columns).sum(2, keepdim=True)).sum(1, keepdim=True)


@dataclass(frozen=True)
class _Grid:
    """Frequencies g / size, g = 0 ... size / 2, and the bump that reads between them: exp(beta (sqrt(1 - z^2) - 1)).

    A function sum_j cos(2 pi f j) x_j of f is the sum of bumps, `width` points wide, around the points of the grid,
    with the heights that the transform of x_j / (the bump's own transform at j) has there: a non-uniform FFT.
    """

    size: int
    width: int

    @classmethod
    def of(cls, length: int, tolerance: float) -> _Grid:
        """Twice as fine as `length` asks for; each point of width is worth a digit."""
        width = math.ceil(math.log10(1 / tolerance)) + 2
        return cls(2 * fast_length(2 * max(length, width)), width)

    @property
    def beta(self) -> float:
        return 2.3 * self.width

    def values(self, x: Tensor) -> Tensor:
        """The heights (n, size / 2 + 1, P) for x (n, L, P)."""
        return self._transform(x / self._window(x)).contiguous()

    def adjoint(self, heights: Tensor, length: int) -> Tensor:
        """The transpose of `values`."""
        y = self._transform(heights)[:, :length]
        return y / self._window(y)

    def _transform(self, t: Tensor) -> Tensor:
        """sum_j cos(2 pi g j / size) t_j (n, size / 2 + 1, P)."""
        return torch.fft.rfft(t, n=self.size, dim=1).real

    def _window(self, like: Tensor) -> Tensor:
        """The transform of the bump at j = 0 ... L - 1, (L, 1): the integral over its width, by the midpoint rule."""
        count = 8 * self.width
        angle = (torch.arange(count, device=like.device, dtype=torch.float64) + 0.5) * (math.pi / count)
        weight = (self.beta * (angle.sin() - 1)).exp() * angle.sin() * (math.pi * self.width / 2 / count)
        place = torch.arange(like.shape[1], device=like.device, dtype=torch.float64)[:, None]
        turns = torch.cos(place * (math.pi * self.width / self.size) * angle.cos())
        return (turns @ weight[:, None]).to(like.dtype)

    def taps(self, turns: Tensor, wanted: Tensor, start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the grid around frequencies (rows, d), the bump there, and its derivative by the frequency.

        All (rows, d width), the latter two zero where a frequency is not wanted. Points count from `start` (rows,).
        """
        folded = turns - turns.round()
        place = folded.abs() * self.size  # in float64: what follows is the rest of it, a few points
        first = torch.ceil(place.nan_to_num(0.0, 0.0, 0.0) - self.width / 2)
        step = torch.arange(self.width, device=turns.device)
        z = ((place - first)[..., None] - step).to(dtype) * (2 / self.width)
        root = (1 - z.square()).clamp(min=1e-6).sqrt()
        bump = (self.beta * (root - 1)).exp() * wanted[..., None]
        slope = bump * z / root * (-2 * self.beta * self.size / self.width) * folded.sign()[..., None].to(dtype)
        point = (first.long()[..., None] + step).abs()
        point = torch.minimum(point, self.size - point) + start[:, None, None]
        return point.flatten(1), bump.flatten(1), slope.flatten(1)


class _AnyCosines(torch.autograd.Function):
    """M = W(q) V - V^T W(k)^T: W (L, grid) has `width` numbers in a row for each d, V are the grid's `values`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, x: Tensor, turns: float, grid: _Grid
    ) -> Tensor:
        ctx.save_for_backward(q, k, rows, columns, x)
        ctx.turns, ctx.grid = turns, grid
        with without_autocast(x.device):
            heights, y = grid.values(x), []
            spread = torch.zeros_like(heights)
            for of_q, of_k, (here,) in _blocks(q, k, rows, columns, turns, grid, x):
                y.append(_read(heights, *of_q()[:2]))
                _spread(spread, *of_k()[:2], here)
            return torch.cat(y).view_as(x) - grid.adjoint(spread, x.shape[1])

    @staticmethod
    @closed_form
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, rows, columns, x = ctx.saved_tensors
        turns, grid = ctx.turns, ctx.grid
        heights, adjoint = grid.values(x), grid.values(grad)
        spread, dx, dq, dk = torch.zeros_like(heights), [], [], []
        d = q.shape[2]
        for of_q, of_k, (here, there) in _blocks(q, k, rows, columns, turns, grid, x, grad):
            point, bump, slope = of_q()
            _spread(spread, point, bump, there)
            dbump = _read_and_slopes(heights, point, bump, there)[1]
            dq.append((dbump * slope).unflatten(1, (d, -1)).sum(-1) * turns)
            point, bump, slope = of_k()
            y, dbump = _read_and_slopes(adjoint, point, bump, here)
            dx.append(y)
            dk.append((dbump * slope).unflatten(1, (d, -1)).sum(-1) * -turns)
        of_x = grid.adjoint(spread, x.shape[1]) - torch.cat(dx).view_as(x)
        return torch.cat(dq).view_as(q), torch.cat(dk).view_as(k), None, None, of_x, None, None


Taps = Callable[[], tuple[Tensor, Tensor, Tensor]]


def _blocks(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, turns: float, grid: _Grid, *values: Tensor
) -> Iterator[tuple[Taps, Taps, tuple[Tensor, ...]]]:
    """Some tokens at a time, of whatever sequence: `grid.taps` of q and of k, and their rows of the values (n, L, P).

    As many as keep what is computed for each tap within a processor's cache, elsewhere within a few times x.
    """
    x = values[0]
    numbers = 2 * IN_CACHE if on_cpu(x) else max(AT_ONCE, 8 * x.numel())
    size = max(1, numbers // (q.shape[2] * grid.width * x.shape[2]))
    start = torch.arange(x.shape[0], device=x.device).repeat_interleave(x.shape[1]) * (grid.size // 2 + 1)
    parts = (t.flatten(0, 1).split(size) for t in (q, k, rows, columns, *values))
    for first, of_q, of_k, row, column, *rest in zip(start.split(size), *parts, strict=True):
        taps = [partial(grid.taps, t.double() * turns, on, first, x.dtype) for t, on in ((of_q, row), (of_k, column))]
        yield taps[0], taps[1], tuple(rest)


def _read(heights: Tensor, point: Tensor, bump: Tensor) -> Tensor:
    """Weighted sums (rows, P) of heights (n, grid, P) at points (rows, taps)."""
    return F.embedding_bag(point, heights.flatten(0, 1), mode="sum", per_sample_weights=bump)


def _read_and_slopes(heights: Tensor, point: Tensor, bump: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """That, and the gradient of the weights where its own is `grad`."""
    y, slopes, *_ = torch.func.vjp(partial(_read, heights, point), bump)
    return y, slopes(grad)[0]


def _spread(heights: Tensor, point: Tensor, bump: Tensor, x: Tensor) -> None:
    """The transpose of reading: adds x (rows, P), weighted, to the heights at the points."""
    heights.view(-1, heights.shape[2]).index_add_(0, point.flatten(), (bump[..., None] * x[:, None]).flatten(0, 1))
