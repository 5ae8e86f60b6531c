"""Attention mixer: softmax of scaled scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..ops.backend import exporting
from ..ops.documents import Documents, rows
from .base import Feature, Inputs, Placed, Settings, StructuredMatrix


@dataclass(frozen=True)
class Attention(StructuredMatrix):
    """M_ij = softmax_j(q_i . k_j / sqrt(d)): the Transformer's. O(L^2) time, O(L) memory through SDPA.

    Documents packed in one row go through its form for variable lengths where there is one, on NVIDIA's GPUs in half
    precision, and through SDPA in a row for each document elsewhere.
    """

    packs: ClassVar[bool] = True

    q: Tensor  # (B, L, H, d)
    k: Tensor  # (B, L, H, d)

    @classmethod
    def features(cls, settings: Settings) -> tuple[Feature, ...]:
        shape = (settings.nheads, settings.d_state)
        return Feature("q", shape), Feature("k", shape)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        return cls(inputs.documents, inputs.features["q"], inputs.features["k"])

    def sizes(self) -> tuple[int, int, int]:
        B, L, H, _ = self.q.shape
        return B, L, H

    def entries(self) -> Tensor:
        scores = torch.einsum("bihd,bjhd->bhij", self.q, self.k) * self.q.shape[-1] ** -0.5
        keys = self._keys()
        return (scores if keys is None else scores.masked_fill(~keys, -torch.inf)).softmax(-1)

    def multiply(self, x: Tensor) -> Tensor:
        if self.documents is not None and self.documents.cu_seqlens is not None:
            return self._multiply_packed(x, self.documents, self.documents.cu_seqlens)
        width = max(x.shape[3], self.q.shape[3])  # other than of one width, the CPU's kernel refuses them
        q, k, v = (rearrange(_widened(t, width), "b l h d -> b h l d") for t in (self.q, self.k, x))
        keys = self._keys()
        if keys is not None and exporting():  # spread by itself, it holds for any length
            keys = keys.expand(-1, -1, x.shape[1], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=self.q.shape[3] ** -0.5)
        return rearrange(y[..., : x.shape[3]], "b h l p -> b l h p")

    def _multiply_packed(self, x: Tensor, documents: Documents, offsets: Tensor) -> Tensor:
        if not _has_varlen(self.q, self.k, x):
            layouts = tuple(rows(documents))
            parts = tuple(Attention(one.documents, one.take(self.q), one.take(self.k)) for one in layouts)
            return Placed(None, parts, layouts) @ x
        from torch.nn.attention.varlen import varlen_attn

        width = -(-max(x.shape[3], self.q.shape[3]) // 8) * 8
        # What it leaves unwritten, beyond the last document, is neither read nor given a gradient.
        q, k, v = (_widened(documents.zero_padding(t), width)[0] for t in (self.q, self.k, x))
        offsets, longest = offsets.int(), documents.at_most or x.shape[1]
        y = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=self.q.shape[3] ** -0.5)
        assert isinstance(y, Tensor)
        return y[None, ..., : x.shape[3]]

    def _keys(self) -> Tensor | None:
        """(B, 1, 1 or L, L) True for keys that may be read; the first stands in for none, its value being zero."""
        if self.documents is None:
            return None
        ids = self.documents.ids
        if self.documents.packed:  # padding reads padding
            return (ids[:, :, None] == ids[:, None, :])[:, None]
        valid = self.documents.valid
        first = torch.arange(valid.shape[1], device=valid.device) == 0
        return rearrange(valid | (first & ~valid.any(1, keepdim=True)), "b l -> b 1 1 l")


def _widened(t: Tensor, width: int) -> Tensor:
    """`t` with zeros after its last numbers."""
    return F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t


def _has_varlen(q: Tensor, k: Tensor, x: Tensor) -> bool:
    """Whether torch's attention for variable lengths takes these."""
    half = x.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == x.dtype
    if not (half and x.is_cuda and torch.version.cuda and max(q.shape[-1], x.shape[-1]) <= 256):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)
