"""Pictures in folders, one a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from .parts import ENDINGS, HELD_OUT_NAMES, TRAIN_NAMES, Parts, both, divided, is_hidden, level_of_classes


class Folder:
    """CLASS/PICTURE, in the order of timm; pictures deeper in a class's folder are of that class."""

    def __init__(self, path: Path, classes: Sequence[str] | None = None, title: str = "") -> None:
        from timm.data.readers.reader_image_folder import find_images_and_targets
        from timm.utils.misc import natural_key

        found = [(file, _folders(file, path)) for file, _ in find_images_and_targets(str(path), ENDINGS)[0]]
        stray = [file for file, folders in found if not folders]
        found = [(file, folders) for file, folders in found if folders and not is_hidden(folders)]
        if not found:
            raise UserError(f"{path} must hold folders of pictures, one a class ({', '.join(ENDINGS)}), it has none")
        if stray:
            told = f"{len(stray)} pictures in no class's folder are left alone, such as {stray[0]}"
            warnings.warn(told, stacklevel=2)
        level = level_of_classes({folders for _, folders in found}, classes or ())
        names = sorted({folders[level] for _, folders in found}, key=lambda name: (natural_key(name), name))
        self.classes = list(classes or names)
        if unknown := [name for name in names if name not in self.classes]:
            raise UserError(f"every class of {path} must be trained on, got {unknown[0]}")
        index = {name: i for i, name in enumerate(self.classes)}
        self.files = [file for file, _ in found]
        self.labels = [index[folders[level]] for _, folders in found]
        self.root, self.title = str(path), title

    def read(self, i: int) -> bytes:
        return Path(self.files[i]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self.title}{os.path.relpath(self.files[i], self.root)}"


def of_folders(path: Path, seed: int) -> Parts:
    """By the names of the folders. Raises UserError."""
    inner = _with_parts(path)
    train, held_out = (_named(inner, names) for names in (TRAIN_NAMES, HELD_OUT_NAMES))
    parts = [part for part in (train, held_out) if part is not None]
    if not any(_own_folders(part) for part in parts):  # where there are such they are classes: trains, tests
        return divided(Folder(path), seed)
    if train is None or held_out is None:
        (only,) = parts
        return divided(Folder(only, title=f"{only.name}/"), seed)
    first = Folder(train, title=f"{train.name}/")
    return both(first, Folder(held_out, first.classes, f"{held_out.name}/"))


def _folders(file: str, root: Path) -> tuple[str, ...]:
    return Path(os.path.relpath(file, root)).parts[:-1]


def _with_parts(path: Path) -> Path:
    """The folder itself, or the only one in it, or the only one in that, which holds a part; itself if none does."""
    inner = path
    while not _named(inner, (*TRAIN_NAMES, *HELD_OUT_NAMES)):
        if len(own := _own_folders(inner)) != 1:
            return path
        (inner,) = own
    return inner


def _named(path: Path, names: Sequence[str]) -> Path | None:
    """The folder that has the first of these names, in letters of any size."""
    own = {entry.name.lower(): entry for entry in _own_folders(path)}
    return next((own[name] for name in names if name in own), None)


def _own_folders(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if entry.is_dir() and not is_hidden([entry.name])]
