"""Which tile sizes, warps and stages a problem gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .feature_grads import FeatureGradsConfig
from .output import OutputConfig
from .states import StatesConfig
from .value_grads import ValueGradsConfig


@dataclass(frozen=True)
class Plan:
    """Chunk length and the configuration of each kernel."""

    chunk: int = 128
    precision: str = "tf32"  # of float32 products; "ieee" is exact, and ignored for 16-bit types
    states: StatesConfig = field(default_factory=StatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    value_grads: ValueGradsConfig = field(default_factory=ValueGradsConfig)
    feature_grads: FeatureGradsConfig = field(default_factory=FeatureGradsConfig)


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def plan(x: Tensor, features: Tensor) -> Plan:
    """The plan for x (B, L, H, P) and features (B, L, G, N)."""
    batch, _, H, P = x.shape
    G, N = features.shape[2:]
    wide = x.dtype == torch.float32
    chunk = 32 if wide or max(N, P) > 64 else 128
    return Plan(
        chunk=chunk,
        precision="ieee",
        states=StatesConfig(local=2 * batch * H < 132),
        output=OutputConfig(heads=divisor(H // G, 4), rows=chunk if wide else 64, packed=not wide, warps=4),
        value_grads=ValueGradsConfig(heads=H // G, pair=chunk == 128),
        feature_grads=FeatureGradsConfig(rows=min(chunk, 64)),
    )
