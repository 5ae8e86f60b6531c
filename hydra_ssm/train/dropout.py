"""Dropout that is a function of the row: the same whatever batch, process or attempt computes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..text.collators import Row

RANGE = 1 << 16  # of the 16 random bits that decide about an element
FACTORS = (0x7FEB352D, -0x7B935975)  # odd, as int32: a multiplication, a shift and an exclusive or mix the bits


class Draw:
    """The random numbers of a batch's tokens, which all dropout modules of a model look at."""

    words: Tensor | None = None  # (B, L) int32, of the batch at hand


class RowDropout(nn.Module):
    """nn.Dropout for h (B, L, width), whose choice follows from the tokens' random numbers and the module's own.

    Raises RuntimeError in training where it has no numbers for these tokens: another dropout would not be the run's.
    """

    salt: Tensor

    def __init__(self, p: float, width: int, number: int, draw: Draw) -> None:
        super().__init__()
        self.p, self.width, self.draw = p, width, draw
        self.least = round(p * RANGE) - RANGE // 2  # int16 below it are dropped
        self.scale = RANGE / (RANGE - round(p * RANGE))
        salt = np.random.default_rng((number, width)).integers(-(1 << 31), 1 << 31, -(-width // 2), dtype=np.int64)
        self.register_buffer("salt", torch.from_numpy(salt.astype(np.int32)), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        if not self.training or not self.p:
            return h
        words = self.draw.words
        if words is None or h.shape != (*words.shape, self.width):
            numbers = "none" if words is None else f"numbers of shape {tuple(words.shape)}"
            raise RuntimeError(
                f"dropout needs h (B, L, {self.width}) and a random number for each of its tokens, got h of shape "
                f"{tuple(h.shape)} and {numbers}"
            )
        return torch.where(self.keep(words), h * self.scale, torch.zeros((), dtype=h.dtype, device=h.device))

    def keep(self, words: Tensor) -> Tensor:
        """(B, L, width) bool; two elements share a random number of 32 bits."""
        bits = words[..., None] + self.salt
        for factor in FACTORS:
            bits = (bits ^ (bits >> 16 & 0xFFFF)) * factor  # the mask: a shift of int32 copies the sign
        bits = bits ^ (bits >> 16 & 0xFFFF)
        return bits.view(torch.int16)[..., : self.width] >= self.least

    def extra_repr(self) -> str:
        return f"p={self.p}"


def by_row(model: nn.Module, width: int) -> Draw:
    """Put RowDropout in the place of every nn.Dropout of a model, all of which see vectors of one width."""
    draw, number, device = Draw(), 0, next((p.device for p in model.parameters()), None)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, RowDropout(child.p, width, number, draw).to(device).train(child.training))
                number += 1
    return draw


def words_of(rows: Sequence[Row]) -> Tensor:
    """(T,) int32, a random number for each token of the rows: a function of the row's key and the place."""
    own = [np.random.default_rng((*row.key, 1)).integers(-(1 << 31), 1 << 31, len(row.tokens)) for row in rows]
    return torch.from_numpy(np.concatenate(own).astype(np.int32))
