"""Pictures in data sets of the datasets library: by name, saved, or in files that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, in_a_line
from .parts import HELD_OUT_NAMES, TRAIN_NAMES, Parts, both, divided


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


def load(name: str) -> Any:
    """Splits by name of a data set on the Hub, NAME:CONFIGURATION too, or of a folder of files. Raises UserError."""
    import datasets

    try:
        return datasets.load_dataset(*name.split(":"))
    except Exception as error:  # the library's and the network's are many
        raise UserError(
            f"{name} is neither a folder, a .tar nor a data set that could be loaded: {in_a_line(error)}"
        ) from error


def load_saved(path: Path) -> Any:
    """Splits by name of what save_to_disk wrote."""
    import datasets

    found = datasets.load_from_disk(str(path))
    return found if isinstance(found, dict) else {"train": found}


def of_splits(splits: Any, name: str, seed: int) -> Parts:
    """By the names of the splits. Raises UserError."""
    train = next((s for s in TRAIN_NAMES if s in splits), None)
    held_out = next((s for s in HELD_OUT_NAMES if s in splits), None)
    if train is None and held_out is None:
        raise UserError(f"{name} must have a split train or validation, it has {', '.join(splits)}")
    if train is None or held_out is None:
        only = train or held_out
        return divided(HubSplit(splits[only], f"{name}, {only}"), seed)
    first = HubSplit(splits[train], f"{name}, {train}")
    return both(first, HubSplit(splits[held_out], f"{name}, {held_out}", first.classes))
