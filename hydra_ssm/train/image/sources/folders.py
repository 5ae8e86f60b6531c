"""Pictures in folders, one a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from .parts import ENDINGS, HELD_OUT_NAMES, TRAIN_NAMES, Parts, both, divided


class Folder:
    """CLASS/PICTURE, at any depth, as timm reads it."""

    def __init__(self, path: Path, classes: Sequence[str] | None = None, title: str = "") -> None:
        from timm.data.readers.reader_image_folder import find_images_and_targets

        found, numbers = find_images_and_targets(str(path), ENDINGS)
        names = list(numbers)  # of the folders, "" of the pictures that are in none
        stray = [file for file, number in found if not names[number]]
        if len(stray) == len(found):
            raise UserError(f"{path} must hold folders of pictures, one a class ({', '.join(ENDINGS)}), it has none")
        if stray:
            told = f"{len(stray)} pictures in no class's folder are left alone, such as {stray[0]}"
            warnings.warn(told, stacklevel=2)
        self.classes = list(classes or filter(None, names))
        if unknown := [name for name in names if name and name not in self.classes]:
            raise UserError(f"every class of {path} must be trained on, got {unknown[0]}")
        index = {name: i for i, name in enumerate(self.classes)}
        samples = [(file, names[number]) for file, number in found if names[number]]
        self.files = [file for file, _ in samples]
        self.labels = [index[name] for _, name in samples]
        self.root, self.title = str(path), title

    def read(self, i: int) -> bytes:
        return Path(self.files[i]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self.title}{os.path.relpath(self.files[i], self.root)}"


def of_folders(path: Path, seed: int) -> Parts:
    """By the names of the folders. Raises UserError."""
    train, held_out = (_named(path, names) for names in (TRAIN_NAMES, HELD_OUT_NAMES))
    parts = [part for part in (train, held_out) if part is not None]
    if not any(_holds_folders(part) for part in parts):  # where there are such they are classes: trains, tests
        return divided(Folder(path), seed)
    if train is None or held_out is None:
        (only,) = parts
        return divided(Folder(only, title=f"{only.name}/"), seed)
    first = Folder(train, title=f"{train.name}/")
    return both(first, Folder(held_out, first.classes, f"{held_out.name}/"))


def _named(path: Path, names: Sequence[str]) -> Path | None:
    """The folder that has the first of these names, in letters of any size."""
    own = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
    return next((own[name] for name in names if name in own), None)


def _holds_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir())
