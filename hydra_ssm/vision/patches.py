"""Pictures cut into patches: sizes along each axis, the linear map of a patch, and positions for another grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .orders import Grid

Size = int | Sequence[int]
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INTERPOLATIONS = {1: "linear", 2: "bicubic", 3: "trilinear"}


def sizes(size: Size, axes: int = 2) -> tuple[int, ...]:
    """Along each axis, of one number for all or one for each."""
    return (size,) * axes if isinstance(size, int) else tuple(int(n) for n in size)


class PatchEmbed(nn.Module):
    """A linear map of each patch: (B, C, H, W) to (B, H / patch, W / patch, D), and so for one axis or three.

    any_size: take pictures of any size of whole patches, not of img_size alone.
    """

    def __init__(
        self, img_size: Size, patch_size: Size, in_chans: int, embed_dim: int, *, any_size: bool = False
    ) -> None:
        super().__init__()
        axes = len(sizes(img_size))
        if axes not in CONVOLUTIONS:
            raise ValueError(f"img_size must have one to three axes, got {img_size}")
        self.patch_size, self.in_chans, self.any_size = sizes(patch_size, axes), in_chans, any_size
        self.proj = CONVOLUTIONS[axes](in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: Size) -> None:
        """The size that pictures are expected to have."""
        self.img_size = sizes(img_size, len(self.patch_size))
        self._check_whole("img_size", self.img_size)
        self.grid_size = tuple(n // p for n, p in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = math.prod(self.grid_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, rows, columns, D). Raises ValueError for pictures of other sizes."""
        axes, size = len(self.patch_size), tuple(x.shape[2:])
        if x.ndim != 2 + axes or x.shape[1] != self.in_chans:
            names = ", ".join(["height", "width"] if axes == 2 else ["size"] * axes)
            raise ValueError(f"pictures must be (batch, {self.in_chans}, {names}), got {tuple(x.shape)}")
        if not self.any_size and size != self.img_size:
            raise ValueError(f"pictures must be of img_size = {self.img_size}, or dynamic_img_size=True, got {size}")
        self._check_whole("pictures", size)
        return self.proj(x).movedim(1, -1)

    def _check_whole(self, what: str, size: Sequence[int]) -> None:
        if len(size) != len(self.patch_size) or any(n < p or n % p for n, p in zip(size, self.patch_size, strict=True)):
            raise ValueError(f"{what} must be a multiple of patch_size = {self.patch_size}, got {tuple(size)}")


def resized(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """Position embeddings (1, patches, D) of a grid, interpolated to another."""
    if tuple(old) == tuple(new):
        return pos_embed
    grid = pos_embed.unflatten(1, old).movedim(-1, 1)
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))  # not every device interpolates in half precision
    mode, flat = INTERPOLATIONS[len(new)], len(new) == 2
    wide = F.interpolate(wide, size=tuple(new), mode=mode, antialias=flat, align_corners=False)
    return wide.to(pos_embed.dtype).flatten(2).mT
