"""Where pictures come from: class folders, tar shards, data sets of the datasets library, scikit-learn's digits.

Each can be asked for any picture at any time, shards too, which is what an exact resumption needs.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import UserError

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


def in_full(data: str | None) -> str | None:
    """The name of the data from wherever one stands: a file's or a folder's whole path."""
    if data is None or not Path(data).expanduser().exists():
        return data
    return str(Path(data).expanduser().resolve())


def open_parts(data: str | None, seed: int = 0) -> tuple[Part, Part, list[str]]:
    """(training pictures, held-out pictures, names of the classes). Raises UserError.

    A division that the data has (folders, shards or splits that are named train, val, test) is kept; otherwise one
    picture in ten is held out.
    """
    if data is None:
        return _divided(Digits(), seed)
    path = Path(data).expanduser()
    if not path.exists():
        return _of_splits(_hub(data), data, seed)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _of_splits(_saved(path), path.name, seed)
    if (shards := _shards(path)) and _are_the_data(shards, path):
        return _of_shards(shards, path, seed)
    if path.is_dir() and (any(path.rglob("*.parquet")) or any(path.rglob("*.arrow"))):
        return _of_splits(_hub(str(path)), path.name, seed)
    if path.is_file():
        raise UserError(f"{path} must be a folder, a .tar or the name of a data set")
    return _of_folders(path, seed)


def open_held_out(data: str | None, classes: Sequence[str], trained_on: np.ndarray | None = None) -> Part:
    """The pictures to evaluate on, with labels that count in `classes`. Raises UserError.

    The held-out part of data that is divided, and of other data all that the model was not trained on.

    Args:
        trained_on: the marks of the pictures that it was trained on, as far as they are known.
    """
    train, held_out, found = open_parts(data)
    if not is_divided(train, held_out):
        held_out = _but(Part(train.source, sorted([*train.index, *held_out.index])), trained_on)
    if unknown := [name for name in found if name not in classes]:
        raise UserError(f"the classes must be those of the model, {', '.join(classes[:5])}, ..., got {unknown[0]}")
    number = [list(classes).index(name) for name in found]
    held_out.source.labels = [number[label] for label in held_out.source.labels]
    return held_out


def _but(whole: Part, trained_on: np.ndarray | None) -> Part:
    """What a model was not trained on. Raises UserError where that is nothing."""
    if trained_on is None:
        return whole
    new = Part(
        whole.source, [i for i, old in zip(whole.index, np.isin(whole.marks(), trained_on), strict=True) if not old]
    )
    if not len(new):
        raise UserError(f"the model was trained on all of these {len(whole)} pictures: there must be some that are new")
    return new


def is_divided(train: Part, held_out: Part) -> bool:
    return train.source is not held_out.source


def _divided(source: Source, seed: int) -> tuple[Part, Part, list[str]]:
    order = np.random.default_rng(seed).permutation(len(source.labels)).tolist()
    if len(order) < 2:
        raise UserError(f"there must be at least two pictures, one to hold out, got {len(order)}")
    held = max(1, len(order) // HELD_OUT)
    return Part(source, sorted(order[held:])), Part(source, sorted(order[:held])), source.classes


def _both(train: Source, held_out: Source) -> tuple[Part, Part, list[str]]:
    return (
        Part(train, list(range(len(train.labels)))),
        Part(held_out, list(range(len(held_out.labels)))),
        train.classes,
    )


# ------------------------------------------------------------------------------------------------------------- folders


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


def _of_folders(path: Path, seed: int) -> tuple[Part, Part, list[str]]:
    train = next((path / name for name in TRAIN_NAMES if (path / name).is_dir()), None)
    held_out = next((path / name for name in HELD_OUT_NAMES if (path / name).is_dir()), None)
    if train is None and held_out is None:
        source = Folder(path)
        _check_classes(source.classes, path)
        return _divided(source, seed)
    if train is None or held_out is None:
        only = train or held_out
        assert only is not None
        return _divided(Folder(only, title=f"{only.name}/"), seed)
    first = Folder(train, title=f"{train.name}/")
    _check_classes(first.classes, train)
    return _both(first, Folder(held_out, first.classes, f"{held_out.name}/"))


def _check_classes(classes: Sequence[str], path: Path) -> None:
    if len(classes) < 2:
        raise UserError(f"{path} must hold folders of at least two classes, it holds {len(classes)}")


# -------------------------------------------------------------------------------------------------------------- shards


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
        if all(name.isdigit() for name in names):  # numbers: the classes are all up to the largest
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
                    classes[key] = file.read().decode().strip()
        _check_end(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        if not pictures:
            raise UserError(f"{path} must be a tar file that is not compressed: {error}") from None
        warnings.warn(f"{path.name} is damaged, its first {len(pictures)} pictures are used: {error}", stacklevel=2)
    found = []
    for key, offset, size, name in pictures:
        folder = Path(name).parent.name
        if key in classes or folder:
            found.append((offset, size, name, classes.get(key, folder)))
    return found


def _check_end(path: Path) -> None:
    """Raises ReadError where the zeros are missing that a tar file ends with: it may be cut between two files."""
    with path.open("rb") as file:
        file.seek(-min(512, path.stat().st_size), 2)
        if any(file.read()):
            raise tarfile.ReadError("unexpected end of data")


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(path.rglob("*.tar"))


def _are_the_data(shards: list[Path], path: Path) -> bool:
    """Whether shards, or the pictures in folders beside them: those that are more files. Says what is left alone."""
    pictures = sum(p.suffix.lower() in ENDINGS and p.parent != path for p in path.rglob("*"))
    if pictures > len(shards):
        warnings.warn(f"{path}: {len(shards)} .tar files among {pictures} pictures are left alone", stacklevel=3)
    elif pictures:
        warnings.warn(f"{path}: {pictures} pictures beside {len(shards)} .tar files are left alone", stacklevel=3)
    return pictures <= len(shards)


def _of_shards(paths: list[Path], root: Path, seed: int) -> tuple[Part, Part, list[str]]:
    root = root.parent if root.is_file() else root

    def is_held_out(path: Path) -> bool:
        below = path.relative_to(root)
        words = re.split(r"[^a-z]+", str(below.with_suffix("")).lower())
        return any(name in words for name in HELD_OUT_NAMES)

    held_out = [path for path in paths if is_held_out(path)]
    train = [path for path in paths if path not in held_out]
    if not held_out or not train:
        return _divided(Shards(paths, root), seed)
    first = Shards(train, root)
    return _both(first, Shards(held_out, root, first.classes))


# --------------------------------------------------------------------------------------------------------- data sets


class HubSplit:
    """A split of a data set of the datasets library, its pictures as the bytes that they are."""

    def __init__(self, split: Any, name: str, classes: Sequence[str] | None = None) -> None:
        import datasets

        kinds = {column: type(feature).__name__ for column, feature in split.features.items()}
        image = next((column for column, kind in kinds.items() if kind == "Image"), None)
        label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
        if label is None:
            label = next((c for c in ("label", "labels", "class") if c in kinds), None)
        if image is None or label is None:
            raise UserError(f"{name} must have a column of pictures and one of classes, it has {', '.join(kinds)}")
        values = split[label]
        self.split, self.column, self.title = split.cast_column(image, datasets.Image(decode=False)), image, name
        feature = split.features[label]
        named = kinds[label] == "ClassLabel"
        if without := sum(v is None or (named and v < 0) for v in values):  # -1 is how test splits hide it
            raise UserError(f"every picture of {name} must have a class, {without:,} have none")
        texts = [feature.names[v] if named else str(v) for v in values]
        self.classes = list(classes or (feature.names if named else sorted(set(texts), key=_natural)))
        number = {value: i for i, value in enumerate(self.classes)}
        if unknown := sorted(set(texts) - number.keys()):
            raise UserError(f"every class of {name} must be trained on, got {unknown[0]}")
        self.labels = [number[text] for text in texts]

    def read(self, i: int) -> bytes:
        item = self.split[i][self.column]
        return item["bytes"] or Path(item["path"]).read_bytes()

    def name(self, i: int) -> str:
        return f"{self.title}, row {i}"


def _natural(text: str) -> tuple[bool, float, str]:
    return (not text.isdigit(), float(text) if text.isdigit() else 0.0, text)


def _hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*name.split(":"))
    except Exception as error:  # the library's and the network's are many
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{name} is neither a folder, a .tar nor a data set that could be loaded: {told}") from error


def _saved(path: Path) -> Any:
    import datasets

    found = datasets.load_from_disk(str(path))
    return found if isinstance(found, dict) else {"train": found}


def _of_splits(splits: Any, name: str, seed: int) -> tuple[Part, Part, list[str]]:
    train = next((s for s in TRAIN_NAMES if s in splits), None)
    held_out = next((s for s in HELD_OUT_NAMES if s in splits), None)
    if train is None and held_out is None:
        raise UserError(f"{name} must have a split train or validation, it has {', '.join(splits)}")
    if train is None or held_out is None:
        only = train or held_out
        return _divided(HubSplit(splits[only], f"{name}, {only}"), seed)
    first = HubSplit(splits[train], f"{name}, {train}")
    return _both(first, HubSplit(splits[held_out], f"{name}, {held_out}", first.classes))


# -------------------------------------------------------------------------------------------------------------- digits


class Digits:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.values = images.reshape(-1, 8, 8)
        self.labels = [int(label) for label in labels]
        self.classes = [str(i) for i in range(10)]

    def read(self, i: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray((self.values[i] * 255 / 16).round().astype(np.uint8)).convert("RGB").save(file, "PNG")
        return file.getvalue()

    def name(self, i: int) -> str:
        return f"digit {i}"


def logistic_regression(train: Part, held_out: Part) -> float:
    """Accuracy of scikit-learn's logistic regression on the pixels of digits, the same held out."""
    from sklearn.linear_model import LogisticRegression

    def table(part: Part) -> tuple[np.ndarray, list[int]]:
        assert isinstance(part.source, Digits)
        pixels = part.source.values[part.index].reshape(len(part), -1) / 16
        return pixels, [part.source.labels[i] for i in part.index]

    x, y = table(train)
    model = LogisticRegression(max_iter=2000).fit(x, y)
    return float(model.score(*table(held_out)))


def most_frequent(train: Part, held_out: Part) -> float:
    """Accuracy of always saying the commonest class."""
    counts = torch.bincount(torch.tensor([train.source.labels[i] for i in train.index]))
    labels = [held_out.source.labels[i] for i in held_out.index]
    return labels.count(int(counts.argmax())) / len(labels)
