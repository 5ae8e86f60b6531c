"""How much of a long computation to do at a time."""

from __future__ import annotations

import torch
from torch import Tensor

IN_CACHE = 1 << 20  # numbers that a processor's cache holds
AT_ONCE = 1 << 24  # the same on other devices, where x has no more


def on_cpu(x: Tensor) -> bool:
    """Whether small parts are fast. To a compiler, each part is more of a program."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def cuts(length: int, size: int) -> list[slice]:
    """Slices of at least one."""
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, length, size)]


def parts(x: Tensor, numbers: int) -> list[tuple[slice, list[slice]]]:
    """Which sequences, and cuts of their tokens, for x (n, L, P) and so many numbers to be computed for each token."""
    n, length, _ = x.shape
    if on_cpu(x):
        tokens = cuts(length, max(64, IN_CACHE // numbers))
        return [(own, tokens) for own in cuts(n, IN_CACHE // (numbers * length))]
    return [(slice(None), cuts(length, max(AT_ONCE, 4 * x.numel()) // (n * numbers)))]
