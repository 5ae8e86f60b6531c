"""Pictures in tar files, as WebDataset writes them or with a folder for each class."""

from __future__ import annotations

import re
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError
from .parts import ENDINGS, HELD_OUT_NAMES, Parts, both, divided

MOST_CLASSES = 1_000_000  # where they are numbers


class Shards:
    """Tar files as WebDataset writes them (KEY.jpg beside KEY.cls), or with a folder for each class.

    They are read through once for the places of their files; after that any picture is one seek away.
    """

    def __init__(self, paths: Sequence[Path], root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        self.paths = [str(path) for path in paths]
        found: list[tuple[int, int, int, str, str]] = []  # shard, offset, size, name, class
        for shard, path in enumerate(paths):
            found += [(shard, *entry) for entry in _entries(path)]
        if not found:
            raise UserError(f"{paths[0].parent} must hold shards with KEY.jpg and KEY.cls, or CLASS/PICTURE in them")
        names = sorted({entry[-1] for entry in found}, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else n))
        if names[-1].isdigit():  # all of them: the classes are all up to the largest
            if int(names[-1]) >= MOST_CLASSES:
                picture = next(entry[3] for entry in found if entry[-1] == names[-1])
                raise UserError(f"{picture} is of class {names[-1]}, classes must be below {MOST_CLASSES:,}")
            names = [str(i) for i in range(int(names[-1]) + 1)]
        self.classes = list(classes or names)
        number = {name: i for i, name in enumerate(self.classes)}
        if unknown := [entry for entry in found if entry[-1] not in number]:
            raise UserError(f"{unknown[0][3]} is of class {unknown[0][-1]}, which no training picture has")
        self.places = np.array([entry[:3] for entry in found], dtype=np.int64)  # no list: workers share its memory
        self.names = np.array([entry[3] for entry in found])
        self.labels = [number[entry[-1]] for entry in found]

    def read(self, i: int) -> bytes:
        shard, offset, size = self.places[i].tolist()
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, i: int) -> str:
        shard = Path(self.paths[int(self.places[i][0])])
        return f"{shard.relative_to(self.root)}/{self.names[i]}"


def _entries(path: Path) -> list[tuple[int, int, str, str]]:
    """(offset, size, name, class) of each picture in a tar file."""
    pictures: list[tuple[str, int, int, str]] = []
    classes: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, dot, ending = member.name.rpartition("/")[2].partition(".")
                key = f"{member.name.rpartition('/')[0]}/{key}"
                if member.isfile() and dot and f".{ending.lower()}".endswith(ENDINGS):
                    pictures.append((key, member.offset_data, member.size, member.name))
                elif member.isfile() and ending == "cls" and (file := archive.extractfile(member)):
                    classes[key] = _class(file.read())
        _check_end(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        if not pictures:
            raise UserError(f"{path} must be a tar file that is not compressed: {error}") from None
        warnings.warn(f"{path.name} is damaged, its first {len(pictures)} pictures are used: {error}", stacklevel=2)
    named = [
        (offset, size, name, classes.get(key, "") if classes else Path(name).parent.name)
        for key, offset, size, name in pictures
    ]
    found = [entry for entry in named if entry[-1]]
    if 0 < len(found) < len(named):
        warnings.warn(f"{path.name}: {len(named) - len(found)} pictures have no class and are left alone", stacklevel=2)
    return found


def _class(content: bytes) -> str:
    """What KEY.cls says, "" where that is nothing: a number below 0 is how the lack of a class is written."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return ""
    return "" if text.startswith("-") and text[1:].isdigit() else text


def _check_end(path: Path) -> None:
    """Raises ReadError where the zeros are missing that a tar file ends with: it may be cut between two files."""
    with path.open("rb") as file:
        file.seek(-min(512, path.stat().st_size), 2)
        if any(file.read()):
            raise tarfile.ReadError("unexpected end of data")


def find_shards(path: Path) -> list[Path]:
    """The tar file itself, or those below a folder."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(path.rglob("*.tar"))


def are_the_data(shards: list[Path], path: Path) -> bool:
    """Whether shards, or the pictures in folders beside them: those that are more files. Says what is left alone."""
    pictures = sum(p.suffix.lower() in ENDINGS and p.parent != path for p in path.rglob("*"))
    if pictures > len(shards):
        warnings.warn(f"{path}: {len(shards)} .tar files among {pictures} pictures are left alone", stacklevel=3)
    elif pictures:
        warnings.warn(f"{path}: {pictures} pictures beside {len(shards)} .tar files are left alone", stacklevel=3)
    return pictures <= len(shards)


def of_shards(paths: list[Path], root: Path, seed: int) -> Parts:
    """By the words in the names of the shards and their folders. Raises UserError."""
    root = root.parent if root.is_file() else root

    def is_held_out(path: Path) -> bool:
        below = path.relative_to(root)
        words = re.split(r"[^a-z]+", str(below.with_suffix("")).lower())
        return any(name in words for name in HELD_OUT_NAMES)

    held_out = [path for path in paths if is_held_out(path)]
    train = [path for path in paths if path not in held_out]
    if not held_out or not train:
        return divided(Shards(paths, root), seed)
    first = Shards(train, root)
    return both(first, Shards(held_out, root, first.classes))
