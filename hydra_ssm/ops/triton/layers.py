"""The convolution and the gated norm as PyTorch operators of their own, for mixers that the fused block does not serve.

As the product's, their backward passes are operators without gradients: both are differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .conv import conv_backward, conv_forward
from .library import differentiable_once, packed, register
from .norm import norm_backward, norm_forward


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool) -> Tensor:
    """y (B, L, C) for x (B, L, C) of any strides, in its dtype or that of autocast; see conv_forward."""
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as the library's convolutions
        x = x.to(torch.get_autocast_dtype(device))
    return torch.ops.hydra_ssm.short_conv(x, weight, bias, ids, activation)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y rstd(y) weight SiLU(z) (B, L, D) for y and z of any strides, in y's dtype; see norm_forward."""
    return torch.ops.hydra_ssm.gated_rms_norm(y, z, weight, eps)[0]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool) -> Tensor:
    weight, bias, ids = packed(weight, bias, ids)
    return conv_forward(_with_rows(x), weight, bias, ids, activation)


def _fake_conv(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias, the last one empty where there is none."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, bias, ids = packed(weight, bias, ids)
    dweight, dbias = conv_backward(dy.contiguous(), _with_rows(x), weight, bias, ids, activation, dx)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias


def _fake_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _save_conv(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, ids = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.hydra_ssm.short_conv_backward(dy, x, weight, bias, ids, ctx.activation)
    return dx, dweight, None if bias is None else dbias, None, None


def _norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(out, rstd)."""
    return norm_forward(y.contiguous(), _with_rows(z), weight.contiguous(), eps)


def _fake_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[:2], dtype=torch.float32)


def _norm_backward(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y, z and weight."""
    dy, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
    grads = norm_backward(dout.contiguous(), y.contiguous(), _with_rows(z), weight.contiguous(), rstd, dy, dz)
    return dy, dz, grads.weight


def _fake_norm_backward(dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:3])


def _save_norm(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], output[1])


def _differentiate_norm(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.hydra_ssm.gated_rms_norm_backward(dout, *ctx.saved_tensors), None


def _with_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? ids, bool activation"
NORM = "Tensor y, Tensor z, Tensor weight"
THREE = "(Tensor, Tensor, Tensor)"
register("short_conv", f"({CONV}) -> Tensor", _conv, _fake_conv, _differentiate_conv, _save_conv)
register(
    "short_conv_backward", f"(Tensor dy, {CONV}) -> {THREE}", _conv_backward, _fake_conv_backward, differentiable_once
)
register(
    "gated_rms_norm", f"({NORM}, float eps) -> (Tensor, Tensor)", _norm, _fake_norm, _differentiate_norm, _save_norm
)
register(
    "gated_rms_norm_backward", f"(Tensor dout, {NORM}, Tensor rstd) -> {THREE}",
    _norm_backward, _fake_norm_backward, differentiable_once,
)  # fmt: skip
