"""Pictures that have a number, a name and a class, and those of them that are trained on or held out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...errors import UserError

TRAIN_NAMES, HELD_OUT_NAMES = ("train", "training"), ("validation", "val", "valid", "test", "eval")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
HELD_OUT = 10  # one picture in so many, where nobody has divided them


class Source(Protocol):
    """Pictures that have a number, a name and a class."""

    classes: list[str]
    labels: list[int]

    def read(self, i: int) -> bytes:
        """The file's content."""
        ...

    def name(self, i: int) -> str:
        """For people."""
        ...


@dataclass(frozen=True)
class Part:
    """Some pictures of a source, by their numbers."""

    source: Source
    index: list[int]

    def __len__(self) -> int:
        return len(self.index)

    def fingerprint(self) -> str:
        """Of names and classes: it changes where pictures come, go or change places."""
        digest = hashlib.sha256()
        for i in self.index:
            digest.update(f"{self.source.name(i)}\t{self.source.labels[i]}\n".encode())
        return digest.hexdigest()

    def marks(self) -> np.ndarray:
        """(pictures,) uint64 of what they hold, by which they are known wherever they have been moved. Reads them."""
        found = b"".join(hashlib.blake2b(self._content(i), digest_size=8).digest() for i in self.index)
        return np.frombuffer(found, dtype="<u8")

    def _content(self, i: int) -> bytes:
        try:
            return self.source.read(i)
        except OSError:  # a file that cannot be read is told of when its turn comes
            return self.source.name(i).encode()


Parts = tuple[Part, Part, list[str]]  # training pictures, held-out pictures, names of the classes


def is_divided(train: Part, held_out: Part) -> bool:
    """Whether the data came so, in two parts."""
    return train.source is not held_out.source


def divided(source: Source, seed: int) -> Parts:
    """One picture in ten held out. Raises UserError where there are none for both."""
    order = np.random.default_rng(seed).permutation(len(source.labels)).tolist()
    if len(order) < 2:
        raise UserError(f"there must be at least two pictures, one to hold out, got {len(order)}")
    held = max(1, len(order) // HELD_OUT)
    return Part(source, sorted(order[held:])), Part(source, sorted(order[:held])), source.classes


def both(train: Source, held_out: Source) -> Parts:
    """All of two sources, as somebody has divided them."""
    first, second = (Part(source, list(range(len(source.labels)))) for source in (train, held_out))
    return first, second, train.classes


def is_hidden(folders: Sequence[str]) -> bool:
    """Whether one of these is no one's class: .ipynb_checkpoints, .git."""
    return any(name.startswith(".") for name in folders)


def level_of_classes(pictures: Collection[Sequence[str]], known: Collection[str] = ()) -> int:
    """Which of the folders that pictures lie in is their class: the first.

    But where all lie below one folder, or below those of the parts, it is the first below at which they differ.

    Args:
        pictures: the folders that each lies in, one at least, from the outermost.
        known: classes, where those are to be found again.
    """
    first, depth = 0, min(map(len, pictures))
    for level in range(depth):
        names = {folders[level] for folders in pictures}
        if names <= set(known):
            return level
        if level + 1 < depth and all(name.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES) for name in names):
            first = level + 1
        elif len(names) > 1:
            return level
    return first
