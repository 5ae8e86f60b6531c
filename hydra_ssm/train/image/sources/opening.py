"""What a name, a folder or a file of pictures stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError
from .digits import Digits
from .folders import of_folders
from .hub import load, load_saved, of_splits
from .parts import Part, Parts, divided, is_divided
from .shards import are_the_data, find_shards, of_shards, refuse_compressed


def in_full(data: str | None) -> str | None:
    """The name of the data from wherever one stands: a file's or a folder's whole path."""
    if data is None or not Path(data).expanduser().exists():
        return data
    return str(Path(data).expanduser().resolve())


def open_parts(data: str | None, seed: int = 0) -> Parts:
    """(training pictures, held-out pictures, names of the classes). Raises UserError.

    A division that the data has (folders, shards or splits that are named train, val, test) is kept; otherwise one
    picture in ten is held out.
    """
    if data is None:
        return divided(Digits(), seed)
    path = Path(data).expanduser()
    if not path.exists():
        return of_splits(load(data), data, seed)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return of_splits(load_saved(path), path.name, seed)
    if (shards := find_shards(path)) and are_the_data(shards, path):
        return of_shards(shards, path, seed)
    if path.is_dir() and (any(path.rglob("*.parquet")) or any(path.rglob("*.arrow"))):
        return of_splits(load(str(path)), path.name, seed)
    refuse_compressed(path)
    if path.is_file():
        raise UserError(f"{path} must be a folder, a .tar or the name of a data set")
    return of_folders(path, seed)


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
