"""A semiseparable triangle: one direction of a state space model, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Triangle:
    """m_ij = dt_j (C_i . B_j) exp(a_{j+1} + ... + a_i) for i >= j, a = dt A; zero above the diagonal.

    `upper` mirrors it (reads right to left). `strict` is the paper's shift: row i becomes what row i - 1 was (i + 1 if
    upper), so the diagonal is empty, a row reads with its neighbour's C, and adjacent tokens have decay 1. `initial` is
    the state S before the first token: it adds exp(sum of the row's decays since the document's start) S C_i.
    """

    dt: Tensor  # (B, L, H), >= 0, float32 or wider, zero at padding
    A: Tensor  # (H,), < 0
    B: Tensor  # (B, L, G, N), G divides H
    C: Tensor  # (B, L, G, N)
    upper: bool = False
    strict: bool = False
    initial: Tensor | None = None  # (H, P, N)

    @property
    def log_decay(self) -> Tensor:
        """a = dt A (B, L, H), in the precision of dt: sums of it are exponents.

        It stops where exp is zero: a larger one says nothing more, and would cost the sums that pass it their digits.
        """
        return (self.dt * self.A.to(self.dt.dtype)).clamp(min=-750.0 if self.dt.dtype == torch.float64 else -105.0)

    def step(self, t: Tensor, dim: int = 1) -> Tensor:
        """`t` moved one token along the reading direction, zeros coming in."""
        zero = torch.zeros_like(t.narrow(dim, 0, 1))
        kept = t.shape[dim] - 1
        if self.upper:
            return torch.cat([t.narrow(dim, 1, kept), zero], dim)
        return torch.cat([zero, t.narrow(dim, 0, kept)], dim)

    def row_C(self, ids: Tensor | None) -> Tensor:
        """The C each row reads with (B, L, G, N): its own or, if strict, its neighbour's in the same document."""
        if not self.strict:
            return self.C
        C = self.step(self.C)
        if ids is None:
            return C
        neighbour = self.step(ids + 2) == ids + 2  # the numbers start at 1: no document is the zero that comes in
        return torch.where(neighbour[..., None, None], C, torch.zeros((), dtype=C.dtype, device=C.device))
