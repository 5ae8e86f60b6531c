"""The pictures of a comparison: decoded once, one tensor, small enough to lie on the GPU."""

from __future__ import annotations

import hashlib
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ....vision.pictures import open_picture
from ...checkpoints import damage, whole_folder
from ...errors import UserError
from ..sources import ENDINGS, HELD_OUT_NAMES, TRAIN_NAMES, is_hidden

FACTS, HELD_OUT = "pictures.json", "test"


class Pictures(NamedTuple):
    """Pictures and what they show."""

    pixels: Tensor  # (n, 3, H, W) uint8
    labels: Tensor  # (n,) int64

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.labels)

    def at(self, index: Tensor) -> Pictures:
        return Pictures(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Pictures:
        return Pictures(self.pixels.to(device), self.labels.to(device))


class Data:
    """What `prepare` has written."""

    def __init__(self, folder: Path) -> None:
        self.facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.classes: list[str] = self.facts["classes"]
        self.train, self.test = (_load(folder, part) for part in ("train", HELD_OUT))

    def digest(self) -> str:
        """Of all pictures and what they show."""
        found = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train, self.test):
            for t in part:
                found.update(f"{tuple(t.shape)}".encode() + t.numpy().tobytes())
        return found.hexdigest()

    def tuning(self) -> tuple[Pictures, Pictures]:
        """The training pictures but a tenth, and that tenth, to choose learning rates on."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        held = len(order) // 10
        return self.train.at(order[held:]), self.train.at(order[:held])


def is_prepared(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def name_of(source: str | Path | None) -> str:
    """What pictures are called."""
    return "digits" if source is None else Path(source).resolve().name


def prepare(source: str | Path | None, folder: Path, size: int = 32) -> None:
    """Decode all pictures into a folder, whole or not at all. Raises UserError, also where it holds those of another.

    Args:
        source: a .tar (also .xz, .gz) with train/CLASS/NAME.jpg and test/CLASS/NAME.jpg in it, at any depth; a folder
            that holds the same, or one that was prepared; None for scikit-learn's digits.
        size: side of the pictures; others are scaled to it.
    """
    if is_prepared(folder):
        if reason := damage(folder):
            raise UserError(f"{folder} is damaged ({reason}): remove it")
        has = Data(folder).facts["source"]
        if has != name_of(source) and not (source and Path(source) == folder):
            raise UserError(f"the pictures in {folder} are those of {has}, got {name_of(source)}: choose another --out")
        return
    found = _digits(size) if source is None else _decoded(Path(source), size)
    if not all(found.values()):
        raise UserError(
            f"{source} must hold train/CLASS/PICTURE and test/CLASS/PICTURE, it holds "
            f"{', '.join(f'{len(v)} {k}' for k, v in found.items())}"
        )
    classes = sorted({name for part in found.values() for name, _ in part})
    number = {name: i for i, name in enumerate(classes)}
    with whole_folder(folder) as new:
        for part, pictures in found.items():
            np.save(new / f"{part}-pixels.npy", np.stack([pixels for _, pixels in pictures]))
            np.save(new / f"{part}-labels.npy", np.array([number[name] for name, _ in pictures]))
        facts = {"classes": classes, "size": size, "source": name_of(source)}
        facts |= {f"{part}_pictures": len(pictures) for part, pictures in found.items()}
        (new / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


Named = list[tuple[str, NDArray[np.uint8]]]  # class and (3, H, W)


def _load(folder: Path, part: str) -> Pictures:
    pixels, labels = (torch.from_numpy(np.load(folder / f"{part}-{what}.npy")) for what in ("pixels", "labels"))
    return Pictures(pixels, labels)


def _decoded(source: Path, size: int) -> dict[str, Named]:
    found: dict[str, Named] = {"train": [], HELD_OUT: []}
    for path, content in _files(source):
        folders = path.parts[:-1]
        place = next((i for i, p in enumerate(folders[:-1]) if p in (*TRAIN_NAMES, *HELD_OUT_NAMES)), None)
        if place is not None and not is_hidden(folders):
            try:
                rgb, _ = open_picture(content)
            except OSError as error:
                raise UserError(f"{path} of {source} cannot be read: {error}") from error
            rgb = rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC)
            part = "train" if folders[place] in TRAIN_NAMES else HELD_OUT
            found[part].append((folders[place + 1], np.array(rgb).transpose(2, 0, 1)))
    return found


def _files(source: Path) -> Iterator[tuple[Path, bytes]]:
    if not source.exists():
        raise UserError(f"there is no file or folder {source}")
    if source.is_dir():
        for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()):
            yield path.relative_to(source), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            found = {}  # in the order of the file: what is compressed cannot be gone back in
            for member in archive:
                if member.isfile() and member.name.lower().endswith(ENDINGS) and (file := archive.extractfile(member)):
                    found[member.name] = file.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{source} must be a folder or a .tar of pictures: {error}") from error
    for name in sorted(found):
        yield Path(name), found[name]


def _digits(size: int) -> dict[str, Named]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pictures: Named = []
    for values, label in zip(images.reshape(-1, 8, 8), labels, strict=True):
        image = Image.fromarray((values * 255 / 16).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
        pictures.append((str(label), np.array(image.convert("RGB")).transpose(2, 0, 1)))
    held = len(pictures) // 5
    return {"train": pictures[held:], HELD_OUT: pictures[:held]}
