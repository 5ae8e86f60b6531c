"""Which tile sizes, warps and stages a problem gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .output import OutputConfig
from .states import StatesConfig


@dataclass(frozen=True)
class Plan:
    """Chunk length and the configuration of each kernel."""

    chunk: int = 128
    precision: str = "tf32"  # of float32 products; "ieee" is exact, and ignored for 16-bit types
    states: StatesConfig = field(default_factory=StatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def plan(x: Tensor, features: Tensor) -> Plan:
    """The plan for x (B, L, H, P) and features (B, L, G, N)."""
    batch, L, H, P = x.shape
    G, N = features.shape[2:]
    wide = x.dtype == torch.float32
    chunk = 32 if wide or max(N, P) > 64 else 128
    walkers = 2 * batch * H
    stretches = max(1, min(512 // walkers, L // (8 * chunk)))
    return Plan(
        chunk=chunk,
        precision="ieee",
        states=StatesConfig(stretches=stretches),
        output=OutputConfig(heads=divisor(H // G, 4), warps=4 if wide else 8),
    )
