"""Centred depthwise convolution over the tokens of each document."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .._autograd import uncast
from .backend import check_layer_impl, conv_misfit, exporting, misplaced, takes_triton, transforming
from .documents import Documents

PORTION = 256  # tokens whose products fit into a CPU's cache


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    documents: Documents | None = None,
    *,
    activation: bool = False,
    impl: str | None = None,
) -> Tensor:
    """y_i = sum_t w_t x_{i + t - width // 2} + bias for x (B, L, C), weight (C, 1, width), width odd.

    Tokens of other documents, padding and what lies outside the row count as zero, whatever x holds there. At padding y
    is finite and nothing to rely on: zero from the kernels, the sum over the tokens in reach from the eager form. The
    gradient of y must be zero there, as that of what is thrown away is.

    Args:
        activation: SiLU on top.
        impl: "triton" (kernels) or "eager". None takes "triton" on CUDA where it can.

    Raises:
        ValueError: shapes do not fit, or impl is "triton", which cannot take these tensors, or is unknown.
        ImportError: impl is "triton", which is not installed.
    """
    check_layer_impl(impl)
    _check(x, weight, bias)
    if takes_triton(impl, x, lambda: misplaced(x, weight, bias) or conv_misfit(weight)):
        from .triton import layers

        return layers.short_conv(x, weight, bias, None if documents is None else documents.ids, activation)
    y = _eager(x if documents is None else documents.zero_padding(x), weight, bias, documents)
    return F.silu(y) if activation else y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, length, channels), got {tuple(x.shape)}")
    channels = x.shape[2]
    if weight.ndim != 3 or weight.shape[:2] != (channels, 1) or weight.shape[2] % 2 == 0:
        raise ValueError(
            f"weight must be ({channels}, 1, an odd width) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be ({channels},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents | None) -> Tensor:
    weight = weight.to(x.dtype)  # under autocast x is in half precision
    if documents is None or documents.cu_seqlens is None:
        y = _convolve(x, weight)
    else:
        halo = weight.shape[-1] // 2
        many = len(documents.cu_seqlens) - 1
        ids = documents.ids[0].where(documents.valid[0], many)
        place = torch.arange(x.shape[1], device=x.device) + halo * ids  # zeros before each document but the first
        apart = x.new_zeros(1, x.shape[1] + halo * many, x.shape[2]).index_copy(1, place, x)
        y = _convolve(apart, weight)[:, place]
    return y if bias is None else y + bias.to(y.dtype)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    if exporting() or transforming():  # padded by itself, it holds for any length: the layouts of others depend on it
        halo = weight.shape[-1] // 2
        return F.conv1d(F.pad(x, (0, 0, halo, halo)).mT, weight, groups=weight.shape[0]).mT
    return _Depthwise.apply(x, weight)


class _Depthwise(torch.autograd.Function):
    """The library's own gradient of the weight costs several times the rest together; a sum for each tap does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _channels_last(x, weight)

    @staticmethod
    @uncast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        width, (batch, length, channels) = weight.shape[-1], x.shape
        padded = F.pad(x, (0, 0, width // 2, width // 2))
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = torch.zeros(width, channels, dtype=wide, device=x.device)
        size = max(1, PORTION // batch) if x.device.type == "cpu" else length
        for start in range(0, length, size):
            part = grad[:, start : start + size].to(wide)
            near = padded[:, start : start + size + width - 1].to(wide)
            for t in range(width):
                taps[t] += (part * near[:, t : t + part.shape[1]]).sum((0, 1))
        return _channels_last(grad, weight.flip(-1)), taps.T.unsqueeze(1).to(weight.dtype)


def _channels_last(x: Tensor, weight: Tensor) -> Tensor:
    """As a two-dimensional convolution (B, L, C) is channels-last: no copy to channels first and back."""
    image = x.contiguous().unsqueeze(1).permute(0, 3, 1, 2)  # (B, C, 1, L), with strides that torch takes for such
    y = F.conv2d(image, weight.unsqueeze(2), padding=(0, weight.shape[-1] // 2), groups=weight.shape[0])
    return rearrange(y, "b c 1 l -> b l c")
