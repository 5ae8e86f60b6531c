"""Pictures in tar files, as WebDataset writes them or with a folder for each class."""

from __future__ import annotations

import re
import tarfile
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ...errors import UserError
from .parts import ENDINGS, HELD_OUT_NAMES, Parts, both, divided, is_hidden, level_of_classes

UNPACKED_BY = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz",
    ".txz": "unxz", ".tar.zst": "unzstd", ".tzst": "unzstd",
}  # fmt: skip
MOST_CLASSES = 1_000_000  # where they are numbers


class Shards:
    """Tar files as WebDataset writes them (KEY.jpg beside KEY.cls), or with a folder for each class.

    They are read through once for the places of their files; after that any picture is one seek away.
    """

    def __init__(self, paths: Sequence[Path], root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        self.paths = [str(path) for path in paths]
        entries = [(shard, *entry) for shard, path in enumerate(paths) for entry in _entries(path)]
        if not entries:
            raise UserError(f"{paths[0].parent} must hold shards with KEY.jpg and KEY.cls, or CLASS/PICTURE in them")
        in_folders = {entry[-1] for entry in entries if isinstance(entry[-1], tuple)}
        level = level_of_classes(in_folders, classes or ()) if in_folders else 0
        if len(paths) > 1 and any(len(folders) > level + 1 for folders in in_folders):
            _warn_of_folders_of_shards([(entry[0], entry[-1][level]) for entry in entries if entry[-1] in in_folders])
        found = [(s, o, n, name, c if isinstance(c, str) else c[level]) for s, o, n, name, c in entries]
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


def _entries(path: Path) -> list[tuple[int, int, str, str | tuple[str, ...]]]:
    """(offset, size, name, class or the folders that it lies in) of each picture in a tar file."""
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
        (offset, size, name, classes.get(key, "") if classes else PurePosixPath(name).parts[:-1])
        for key, offset, size, name in pictures
        if classes or not is_hidden(PurePosixPath(name).parts[:-1])
    ]
    found = [entry for entry in named if entry[-1]]
    if 0 < len(found) < len(named):
        warnings.warn(f"{path.name}: {len(named) - len(found)} pictures have no class and are left alone", stacklevel=2)
    return found


def _warn_of_folders_of_shards(found: Sequence[tuple[int, str]]) -> None:
    """Where each tar file holds one folder of its own, with more in them: that may be its class, or just its name."""
    pairs = set(found)
    if len(pairs) == len({shard for shard, _ in pairs}) == len({name for _, name in pairs}) > 1:
        told = f"each .tar holds one folder, which is taken for its class, such as {min(name for _, name in pairs)}"
        warnings.warn(f"{told}: if the folders within are the classes, pack them without it", stacklevel=3)


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


def refuse_compressed(path: Path) -> None:
    """Raises UserError where the file, or one in the folder, is a compressed tar, and no folder holds pictures."""
    if any(p.suffix.lower() in ENDINGS and p.parent != path for p in path.rglob("*")):
        return
    files = [p for p in (path, *path.rglob("*")) if p.is_file()]
    packed = [(p, by) for p in files for ending, by in UNPACKED_BY.items() if p.name.lower().endswith(ending)]
    if packed:
        file, by = min(packed)
        raise UserError(f"shards must not be compressed, got {file}: unpack each, such as with {by} {file.name}")


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
