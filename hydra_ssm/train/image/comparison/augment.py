"""Augmentation of a whole batch where it lies: the recipe's, without a loader between pictures and GPU.

Everything is drawn from (seed, step) alone, so that a step is the same whatever came before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pictures
COLOURS = ("identity", "brightness", "contrast", "colour", "sharpness", "posterize", "solarize", "invert", "stretch")
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
LEVEL, LEVEL_STD, EACH = 9.0, 0.5, 0.5  # RandAugment 9/0.5; each of its two operations happens with probability 0.5
SLOTS = 2
MIXUP_ALPHA = 0.8
GREY, SMOOTH = (0.299, 0.587, 0.114), (1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: each copy would wait for all that the device still has to do."""
    with torch.inference_mode(False):  # they serve training too
        return torch.tensor(values, device=device)


@dataclass(frozen=True)
class Strength:
    """How much is done to a picture.

    Args:
        crop: most pixels that a picture is moved by, each way; it is mirrored with probability 0.5.
        randaugment: whether two random operations of colour or place follow, at 9 of 10.
        mix: probability of being mixed with another picture, by mixup 0.8 or cutmix 1.0.
        erase: probability of losing a rectangle.
        smoothing: of the labels.
    """

    crop: int = 4
    randaugment: bool = True
    mix: float = 0.5
    erase: float = 0.0
    smoothing: float = 0.1


class Random:
    """Numbers of one step of one seed, on the device of the pictures."""

    def __init__(self, seed: int, step: int, device: torch.device) -> None:
        self.device, self.numpy = device, np.random.default_rng((seed, step))
        self.generator = torch.Generator(device).manual_seed(int(self.numpy.integers(1 << 62)))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def sign(self, *shape: int) -> Tensor:
        return self.integers(2, *shape) * 2.0 - 1.0

    def beta(self, a: float, n: int) -> Tensor:
        return torch.from_numpy(self.numpy.beta(a, a, n).astype(np.float32)).to(self.device, non_blocking=True)


def normalized(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) float32 of uint8."""
    mean, std = (constant(v, pictures.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


def augmented(
    pictures: Tensor, labels: Tensor, classes: int, strength: Strength, random: Random
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) uint8 and labels (B,) as a model trains on them: (B, 3, H, W), (B, classes) float32."""
    B, _, H, W = pictures.shape
    x = pictures.float() / 255
    matrix = _crop_and_mirror(B, strength.crop, H, W, random)
    if strength.randaugment:
        for _ in range(SLOTS):
            x, matrix = _randaugment(x, matrix, random)
    x = _moved(normalized(x * 255), matrix)
    target = torch.full((B, classes), strength.smoothing / classes, device=x.device)
    target.scatter_(1, labels[:, None], 1 - strength.smoothing + strength.smoothing / classes)
    if strength.mix:
        x, target = _mixed(x, target, strength.mix, random)
    return (_erased(x, strength.erase, random) if strength.erase else x), target


def _crop_and_mirror(B: int, crop: int, H: int, W: int, random: Random) -> Tensor:
    """(B, 3, 3) from a place in the result to the place that it shows, in coordinates from -1 to 1."""
    matrix = torch.eye(3, device=random.device).repeat(B, 1, 1)
    matrix[:, 0, 0] = random.sign(B)
    matrix[:, 0, 2] = (random.integers(2 * crop + 1, B) - crop) * 2.0 / W
    matrix[:, 1, 2] = (random.integers(2 * crop + 1, B) - crop) * 2.0 / H
    return matrix


def _randaugment(x: Tensor, matrix: Tensor, random: Random) -> tuple[Tensor, Tensor]:
    """One operation for each picture, of colour (done here) or of place (added to the matrix)."""
    B = len(x)
    level = (LEVEL + LEVEL_STD * random.normal(B)).clamp(0, 10) / 10
    chosen = 1 + random.integers(len(COLOURS) + len(MOVES) - 1, B)
    chosen = torch.where(random.uniform(B) < EACH, chosen, 0)  # COLOURS[0] is the identity
    sign = random.sign(B)
    found = x
    for index, name in enumerate(COLOURS[1:], start=1):
        changed = _COLOUR[name](x, level.view(B, 1, 1, 1), sign.view(B, 1, 1, 1))
        found = torch.where((chosen == index).view(B, 1, 1, 1), changed, found)
    return found, matrix @ _move(chosen - len(COLOURS), level * sign)


def _move(chosen: Tensor, amount: Tensor) -> Tensor:
    """(B, 3, 3) of the operation of place that each picture has, if it has one."""

    def where(name: str, value: Tensor) -> Tensor:
        return torch.where(chosen == MOVES.index(name), value, 0.0)

    angle = where("rotate", amount * math.radians(30))
    rows = [
        torch.stack([angle.cos(), where("shear_x", 0.3 * amount) - angle.sin(), where("translate_x", 0.9 * amount)], 1),
        torch.stack([where("shear_y", 0.3 * amount) + angle.sin(), angle.cos(), where("translate_y", 0.9 * amount)], 1),
        constant((0.0, 0.0, 1.0), amount.device).expand(len(amount), 3),
    ]
    return torch.stack(rows, 1)


def _moved(x: Tensor, matrix: Tensor) -> Tensor:
    """Outside of a picture is its mean colour, 0."""
    grid = F.affine_grid(matrix[:, :2], list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _blend(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """PIL's: b at 0, a at 1, beyond both elsewhere."""
    return (b + factor * (a - b)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    return (x * constant(GREY, x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _sharpness(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    kernel = constant(SMOOTH, x.device).view(3, 3) / 13
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel.expand(3, 1, 3, 3), groups=3)
    return _blend(x, smooth, 1 + 0.9 * level * sign)


def _posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    step = 2.0 ** (8 - (4 - (4 * level).floor()))  # keeps 4 bits at level 0, none at 10
    return ((x * 255 / step).floor() * step / 255).clamp(0, 1)


def _stretch(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low).clamp(min=1 / 255)


_COLOUR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "brightness": lambda x, level, sign: _blend(x, torch.zeros_like(x), 1 + 0.9 * level * sign),
    "contrast": lambda x, level, sign: _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), 1 + 0.9 * level * sign),
    "colour": lambda x, level, sign: _blend(x, _grey(x), 1 + 0.9 * level * sign),
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": lambda x, level, sign: torch.where(x < 1 - level, x, 1 - x),
    "invert": lambda x, level, sign: 1 - x,
    "stretch": _stretch,
}


def _mixed(x: Tensor, target: Tensor, probability: float, random: Random) -> tuple[Tensor, Tensor]:
    """Each picture alone, or with another one: as a sum (mixup) or with a rectangle of it (cutmix)."""
    B, _, H, W = x.shape
    mixes, cuts = random.uniform(B) < probability, random.uniform(B) < 0.5
    share = torch.where(cuts, random.uniform(B), random.beta(MIXUP_ALPHA, B))
    share = torch.where(mixes, share, 1.0)
    side = torch.where(cuts, (1 - share).sqrt(), 0.0)
    inside = _rectangle(side * H, side * W, random, H, W)
    share = torch.where(cuts, 1 - inside.float().mean((1, 2, 3)), share)
    ratio = torch.where(cuts, 1.0, share).view(B, 1, 1, 1)
    y = torch.where(inside, x.flip(0), x * ratio + x.flip(0) * (1 - ratio))
    return y, target * share[:, None] + target.flip(0) * (1 - share[:, None])


def _rectangle(height: Tensor, width: Tensor, random: Random, H: int, W: int) -> Tensor:
    """(B, 1, H, W) bool, True in a rectangle of these sizes about a random place."""
    B = len(height)
    row, column = (torch.arange(n, device=height.device) + 0.5 for n in (H, W))
    tall = (row - random.uniform(B, 1) * H).abs() < height[:, None] / 2
    wide = (column - random.uniform(B, 1) * W).abs() < width[:, None] / 2
    return (tall[:, :, None] & wide[:, None, :])[:, None]


def _erased(x: Tensor, probability: float, random: Random) -> Tensor:
    """Random erasing, of 2 to 33 % of the area, filled with noise."""
    B, _, H, W = x.shape
    area = torch.where(random.uniform(B) < probability, random.uniform(B, low=0.02, high=1 / 3), 0.0)
    aspect = random.uniform(B, low=-math.log(1 / 0.3), high=math.log(1 / 0.3)).exp().sqrt()
    inside = _rectangle(area.sqrt() * aspect * H, area.sqrt() / aspect * W, random, H, W)
    return torch.where(inside, random.normal(*x.shape), x)
