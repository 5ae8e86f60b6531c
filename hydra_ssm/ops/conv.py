"""Centred depthwise convolution over the tokens of each document."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .documents import Documents


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, documents: Documents | None = None) -> Tensor:
    """y_i = sum_t w_t x_{i + t - width // 2} + bias for x (B, L, C), weight (C, 1, width), width odd.

    Tokens of other documents, padding and what lies outside the row count as zero; x must be zero at padding.
    """
    if documents is None or not documents.packed:
        return _convolve(x, weight, bias)
    halo = weight.shape[-1] // 2
    assert documents.cu_seqlens is not None
    gaps = halo * (len(documents.cu_seqlens) - 1)
    place = torch.arange(x.shape[1], device=x.device)
    ids = documents.ids[0].where(documents.valid[0], len(documents.cu_seqlens) - 1)
    place = place + halo * ids  # a gap of zeros before each document but the first, and before the padding
    apart = torch.zeros_like(x[:, :1]).expand(-1, x.shape[1] + gaps, -1).index_copy(1, place, x)
    return _convolve(apart, weight, bias)[:, place]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[-1]
    y = F.conv1d(rearrange(x, "b l c -> b c l"), weight, bias, padding=width // 2, groups=weight.shape[0])
    return rearrange(y, "b c l -> b l c")
