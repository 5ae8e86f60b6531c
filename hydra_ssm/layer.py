"""One layer of the residual stack, and what may scale or drop what its branches add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .mixer import MatrixMixer
from .ops import Documents, Order


class Modulation(nn.Linear):
    """What a condition does to a branch: scale and shift of what it reads, gate of what it adds. Nothing, at first."""

    def __init__(self, d_condition: int, d_model: int) -> None:
        super().__init__(d_condition, 3 * d_model)

    def reset_parameters(self) -> None:
        """All zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self, condition: Tensor, documents: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, shift and gate, (B or 1, 1 or L, d_model) each, of conditions (documents, d_condition)."""
        found = _spread(super().forward(F.silu(condition)), documents)
        scale, shift, gate = found.chunk(3, dim=-1)
        return 1 + scale, shift, 1 + gate


class DropPath(nn.Module):
    """In training, drop what a branch adds with probability `rate`, each document on its own, and scale what stays."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, y: Tensor, documents: Documents | None) -> Tensor:
        """(B, L, D) in and out."""
        if not self.training or self.rate == 0:
            return y
        offsets = None if documents is None else documents.cu_seqlens
        count = len(y) if offsets is None else len(offsets) - 1
        kept = (torch.rand(count, 1, device=y.device) >= self.rate).to(y.dtype) / (1 - self.rate)
        return y * _spread(kept, documents)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def _spread(t: Tensor, documents: Documents | None) -> Tensor:
    """t (documents, n) for each token, (B, 1, n) or, where one row holds many documents, (1, L, n)."""
    return t[documents.ids.clamp(min=0)] if documents is not None and documents.packed else t[:, None]


class EncoderLayer(nn.Module):
    """Mixer, then a feed-forward network if `d_ff`; each with a residual and a LayerNorm, after it or before it."""

    def __init__(
        self,
        mixer: MatrixMixer,
        *,
        d_ff: int = 0,
        norm: Literal["post", "pre"] = "post",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        d_condition: int = 0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise ValueError(f"norm must be 'post' or 'pre', got {norm!r}")
        for name, width in (("d_ff", d_ff), ("d_condition", d_condition)):
            if width < 0:
                raise ValueError(f"{name} must be a width, or 0 for none, got {width}")
        D = mixer.d_model
        self.pre = norm == "pre"
        self.mixer = mixer
        self.norm = nn.LayerNorm(D, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.modulation = Modulation(d_condition, D) if d_condition else None
        self.feed_forward = None
        if d_ff:
            self.feed_forward = nn.Sequential(nn.Linear(D, d_ff), nn.GELU(), nn.Linear(d_ff, D), nn.Dropout(dropout))
            self.feed_forward_norm = nn.LayerNorm(D, eps=eps)
            self.feed_forward_modulation = Modulation(d_condition, D) if d_condition else None

    def forward(
        self,
        h: Tensor,
        documents: Documents | None = None,
        condition: Tensor | None = None,
        order: Order | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One layer on h (B, L, d_model) in one of the forms of `Documents`.

        Args:
            condition: (documents, d_condition).
            order: orders to mix along, whose results are added; then h is in any form, `mask` (B, L) instead of
                documents tells its tokens, and what comes out elsewhere means nothing.

        Raises:
            ValueError: a mask without an order, or documents with one.
        """
        if order is None and mask is not None:
            raise ValueError("mask must come with an order: without one, documents tell the tokens")
        if order is not None and documents is not None:
            raise ValueError("documents must come without an order: with one, mask tells the tokens")

        def mix(u: Tensor) -> Tensor:
            if order is None:
                return self.dropout(self.mixer(u, documents=documents))
            return self.dropout(order.restore(self.mixer(order.take(u), None if mask is None else order.take(mask))))

        h = self._branch(h, mix, self.norm, self.modulation, condition, documents)
        if self.feed_forward is None:
            return h
        own = self.feed_forward_norm, self.feed_forward_modulation
        return self._branch(h, self.feed_forward, *own, condition, documents)

    def _branch(
        self,
        h: Tensor,
        f: Callable[[Tensor], Tensor],
        norm: nn.Module,
        modulation: nn.Module | None,
        condition: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """h + f(h), with the norm at its place and f modulated."""
        u = norm(h) if self.pre else h
        if modulation is None or condition is None:
            y = f(u)
        else:
            scale, shift, gate = modulation(condition, documents)
            y = f(u * scale + shift) * gate
        h = h + self.drop_path(y, documents)
        return h if self.pre else norm(h)
