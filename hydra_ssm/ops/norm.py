"""Gated RMS normalisation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import check_layer_impl, misplaced, norm_misfit, takes_triton


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """y / rms(y) * weight * SiLU(gate) over the last axis, the norm before the gate; statistics in float32 or wider.

    impl: "triton" (kernels, for y (B, L, D)) or "eager". None takes "triton" on CUDA where it can.

    Raises:
        ValueError: shapes do not fit, or impl is "triton", which cannot take these tensors, or is unknown.
        ImportError: impl is "triton", which is not installed.
    """
    check_layer_impl(impl)
    if gate.shape != y.shape or weight.shape != y.shape[-1:]:
        raise ValueError(
            f"gate must be {tuple(y.shape)} and weight {tuple(y.shape[-1:])}, as y is, "
            f"got {tuple(gate.shape)} and {tuple(weight.shape)}"
        )
    if takes_triton(impl, y, lambda: _misfit(y, gate, weight)):
        from .triton import layers

        return layers.gated_rms_norm(y, gate, weight, eps)
    wide = torch.promote_types(y.dtype, torch.float32)
    scale = torch.rsqrt(y.to(wide).square().mean(-1, keepdim=True) + eps)
    return (y.to(wide) * scale * weight.to(wide) * F.silu(gate.to(wide))).to(y.dtype)


def _misfit(y: Tensor, gate: Tensor, weight: Tensor) -> str | None:
    if y.ndim != 3:
        return f"needs y and gate (batch, length, width) alike, got {tuple(y.shape)} and {tuple(gate.shape)}"
    return misplaced(y, gate, weight) or norm_misfit(y.shape[-1])
