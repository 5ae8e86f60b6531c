"""Gated RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y / rms(y) * weight * SiLU(gate) over the last axis, the norm before the gate; statistics in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = torch.rsqrt(y.to(wide).square().mean(-1, keepdim=True) + eps)
    return (y.to(wide) * scale * weight.to(wide) * F.silu(gate.to(wide))).to(y.dtype)
