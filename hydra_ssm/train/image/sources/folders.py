"""Pictures in folders, one a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from .parts import HELD_OUT_NAMES, TRAIN_NAMES, Parts, both, divided


class Folder:
    """CLASS/PICTURE, at any depth, as timm reads it."""

    def __init__(self, path: Path, classes: Sequence[str] | None = None, title: str = "") -> None:
        from timm.data.readers import create_reader

        known = None if classes is None else {name: i for i, name in enumerate(classes)}
        try:
            self.reader = create_reader("", root=str(path), class_map=known)
        except RuntimeError as error:
            raise UserError(f"{path} must hold folders of pictures, one a class: {error}") from None
        self.classes = list(classes or self.reader.class_to_idx)
        self.labels = [label for _, label in self.reader.samples]
        self.title = title

    def read(self, i: int) -> bytes:
        return Path(self.reader.samples[i][0]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self.title}{self.reader.filename(i)}"


def of_folders(path: Path, seed: int) -> Parts:
    """By the names of the folders. Raises UserError."""
    train = next((path / name for name in TRAIN_NAMES if (path / name).is_dir()), None)
    held_out = next((path / name for name in HELD_OUT_NAMES if (path / name).is_dir()), None)
    if train is None and held_out is None:
        source = Folder(path)
        _check_classes(source.classes, path)
        return divided(source, seed)
    if train is None or held_out is None:
        only = train or held_out
        assert only is not None
        return divided(Folder(only, title=f"{only.name}/"), seed)
    first = Folder(train, title=f"{train.name}/")
    _check_classes(first.classes, train)
    return both(first, Folder(held_out, first.classes, f"{held_out.name}/"))


def _check_classes(classes: Sequence[str], path: Path) -> None:
    if len(classes) < 2:
        raise UserError(f"{path} must hold folders of at least two classes, it holds {len(classes)}")
