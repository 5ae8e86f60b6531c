"""Pictures as batches: the order and every random choice follow from (seed, epoch, picture) alone.

So a run goes on after a kill as if nothing had happened, with any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...vision.pictures import UNREADABLE, open_picture
from ..errors import UserError, in_a_line
from .recipe import ImageRecipe
from .sources import Part

MISSING = -1  # the label of a picture that could not be read, in evaluation
MOST_IN_A_ROW = 1000  # unreadable pictures
Key = tuple[int, int, int]  # number of the picture, seed, epoch
Notes = dict[str, str]  # by name of a picture


class Batch(NamedTuple):
    """Pictures (B, 3, H, W) uint8, labels (B,), and what there is to say of some of them."""

    pixels: Tensor
    labels: Tensor
    notes: Notes


class Pictures(Dataset[tuple[Tensor, int, Notes]]):
    """The pictures of a part, transformed. In training one that cannot be read is replaced by the next."""

    def __init__(self, part: Part, transform: Any, training: bool) -> None:
        self.part, self.transform, self.training = part, transform, training

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, Notes]:
        place, seed, epoch = key
        notes: Notes = {}
        for tried in range(min(MOST_IN_A_ROW, len(self.part))):
            i = self.part.index[(place + tried) % len(self.part)]
            seed_drawing(seed, epoch, place)
            try:
                picture, done = open_picture(self.part.source.read(i))
                pixels = self.transform(picture)
            except Exception as error:  # of whatever class: readers, decoders and transforms have many
                reason = " ".join(str(error).split()) or type(error).__name__
                notes[self.part.source.name(i)] = f"{UNREADABLE}: {reason}"
                if self.training:
                    continue
                pixels = self.transform(open_picture_of_nothing())
                return pixels, MISSING, notes
            if done:
                notes[self.part.source.name(i)] = done
            return pixels, self.part.source.labels[i], notes
        raise UserError(f"none of {MOST_IN_A_ROW:,} pictures in a row could be read: {next(iter(notes.items()))}")


def open_picture_of_nothing() -> Any:
    """In place of one that could not be read, and is not counted."""
    from PIL import Image

    return Image.new("RGB", (8, 8))


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
        return create_transform(
            config["input_size"], is_training=True, scale=recipe.scale, hflip=recipe.hflip, use_prefetcher=True,
            auto_augment=recipe.randaugment or None, color_jitter=0.0, interpolation=config["interpolation"],
            mean=config["mean"], std=config["std"],
        )  # fmt: skip
    except (AssertionError, ValueError, LookupError) as error:
        usual = ImageRecipe.randaugment
        raise UserError(
            f"randaugment must be what timm knows, such as {usual}, got {recipe.randaugment}: {in_a_line(error)}"
        ) from error


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
