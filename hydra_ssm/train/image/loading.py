"""Pictures as batches: the order and every random choice follow from (seed, epoch, picture) alone.

So a run goes on after a kill as if nothing had happened, with any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...vision.pictures import UNREADABLE, open_picture
from ..errors import UserError, in_a_line
from .recipe import ImageRecipe
from .sources import Part

MISSING = -1  # the label of a picture that could not be read, in evaluation
MOST_TRIES = 1000  # to draw a picture that can be read
Key = tuple[int, int, int]  # number of the picture, seed, epoch
Notes = dict[str, str]  # by name of a picture


class Batch(NamedTuple):
    """Pictures (B, 3, H, W) uint8, labels (B,), and what there is to say of some of them."""

    pixels: Tensor
    labels: Tensor
    notes: Notes


class Pictures(Dataset[tuple[Tensor, int, Notes]]):
    """The pictures of a part, transformed. In training one that cannot be read is replaced by another, drawn anew."""

    def __init__(self, part: Part, transform: Any, training: bool) -> None:
        self.part, self.transform, self.training = part, transform, training

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, Notes]:
        notes: Notes = {}
        for tried in range(MOST_TRIES if self.training else 1):
            i = self.part.index[_drawn(key, tried, len(self.part))]
            name = self.part.source.name(i)
            try:
                picture, done = open_picture(self.part.source.read(i))
            except Exception as error:  # of whatever class: readers and decoders have many
                notes[name] = f"{UNREADABLE}: {' '.join(str(error).split()) or type(error).__name__}"
                continue
            if done:
                notes[name] = done
            return self._transformed(picture, name), self.part.source.labels[i], notes
        if not self.training:
            return self._transformed(Image.new("RGB", (8, 8)), "nothing"), MISSING, notes  # is not counted
        name, told = next(iter(notes.items()))
        raise UserError(
            f"pictures must be such as can be read, of {len(self.part):,} none of {MOST_TRIES:,} drawn could be: "
            f"{name} {told}"
        )

    def _transformed(self, picture: Image.Image, name: str) -> Tensor:
        try:
            return self.transform(picture)
        except Exception as error:  # no fault of the file, which has been decoded
            error.add_note(f"in the transform of {name}, of {picture.width} x {picture.height} pixels")
            raise


def _drawn(key: Key, tried: int, pictures: int) -> int:
    """The place of the picture to try, and the seed of its transform: the key's own, or one drawn in its stead."""
    place, seed, epoch = key
    if not tried:
        seed_drawing(seed, epoch, place)
        return place
    seed_drawing(seed, epoch, place, 0, tried)  # 0: a step draws from (seed, step, rank, 1)
    return random.randrange(pictures)


def seed_drawing(*key: int) -> int:
    """Seed all that timm's transforms draw from, and torch's generator of the CPU with the seed that is returned.

    torch.manual_seed would take a millisecond a picture: it seeds every kind of device, with a stack trace for each.
    """
    seeds = [int(s) for s in np.random.SeedSequence(key).generate_state(4)]
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seed := seeds[2] << 32 | seeds[3])
    return seed


def collate(items: list[tuple[Tensor, int, Notes]]) -> Batch:
    """Items side by side."""
    notes: Notes = {}
    for _, _, own in items:
        notes |= own
    return Batch(torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items]), notes)


class TrainingOrder:
    """The batches of an epoch that one of `world` processes computes, from a step on."""

    def __init__(self, pictures: int, recipe: ImageRecipe, rank: int, world: int) -> None:
        self.pictures, self.recipe, self.rank, self.world = pictures, recipe, rank, world
        self.steps = pictures // recipe.batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        seed, size = self.recipe.seed, self.recipe.batch_size
        order = np.random.default_rng((seed, self.epoch)).permutation(self.pictures)
        for step in range(self.start, self.steps):
            own = order[step * size : (step + 1) * size][self.rank :: self.world]
            yield [(int(place), seed, self.epoch) for place in own]


class EvaluationOrder:
    """Every picture once, dealt out over the processes."""

    def __init__(self, pictures: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        own = range(rank, pictures, world)
        self.batches = [[(i, 0, 0) for i in own[k : k + batch_size]] for k in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)


def training_transform(recipe: ImageRecipe, config: dict[str, Any]) -> Any:
    """timm's, to uint8: the rest happens where the model is. Raises UserError for a randaugment that timm has not."""
    try:
        transform = create_transform(
            config["input_size"], is_training=True, scale=recipe.scale, hflip=recipe.hflip, use_prefetcher=True,
            auto_augment=recipe.randaugment or None, color_jitter=0.0, interpolation=config["interpolation"],
            mean=config["mean"], std=config["std"],
        )  # fmt: skip
    except (AssertionError, ValueError, LookupError) as error:
        usual = ImageRecipe.randaugment
        raise UserError(
            f"randaugment must be what timm knows, such as {usual}, got {recipe.randaugment}: {in_a_line(error)}"
        ) from error
    for operation in operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """timm's operations in a transform, however deep its lists hold them."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    elif isinstance(transform, (list, tuple)):
        for own in transform:
            yield from operations(own)
    else:
        for name in ("transforms", "ops", "policy"):  # of Compose, RandAugment and AugMix, AutoAugment
            yield from operations(getattr(transform, name, ()))


def posterize(picture: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, and black where no bit is left: timm asks for that at magnitude 10, Pillow 13 no longer does it."""
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    return auto_augment.posterize(picture, bits, **options)


def evaluation_transform(config: dict[str, Any]) -> Any:
    """timm's, to uint8."""
    return create_transform(
        config["input_size"], interpolation=config["interpolation"], crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode"), use_prefetcher=True,
    )  # fmt: skip


def loader(pictures: Pictures, order: TrainingOrder | EvaluationOrder, workers: int) -> DataLoader[Any]:
    """Batches in this order."""
    return DataLoader(
        pictures, batch_sampler=order, num_workers=workers, collate_fn=collate,  # type: ignore[arg-type]
        pin_memory=torch.cuda.is_available(), worker_init_fn=_one_thread if workers else None,
    )  # fmt: skip


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def normalized(pixels: Tensor, config: dict[str, Any], device: torch.device) -> Tensor:
    """(B, 3, H, W) float32 on the device, channels last, of uint8."""
    mean, std = (torch.tensor(config[name], device=device).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
    x = pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.channels_last)
    return x.sub_(mean).div_(std)
