"""Documents from text files, folders, data sets, or the text that every Python carries."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .._extras import require
from ..text.reading import read_text
from .errors import UserError
from .reference_text import language_reference

TEXT = {".txt", ".text", ".md", ".rst"}
DATA = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
HALF = re.compile("[\ud800-\udfff]")  # of a character, as JSON can spell it: no text has it alone
TEXT_COLUMN = "text"  # where the user names no other
ONE_IN = 20  # so many documents, one is held out; of fewer documents, the last part of each


class Texts(Protocol):
    """Documents that can be read again."""

    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Files:
    """Each file is a document."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[str]:
        return map(read_text, self.paths)

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Column:
    """Each row of a data set is a document."""

    dataset: Any
    name: str

    def __iter__(self) -> Iterator[str]:
        for batch in self.dataset.select_columns(self.name).iter(1000):
            yield from (text or "" for text in batch[self.name])

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class Corpus:
    """What to train on, and what to keep from training."""

    train: Sequence[Texts]
    held_out: Sequence[Texts] = ()  # none: a twentieth of `train`

    def __iter__(self) -> Iterator[tuple[bool, str]]:
        """(held out, document) of all, in an order that is the same every time."""
        if self.held_out:
            yield from ((False, text) for texts in self.train for text in texts)
            yield from ((True, text) for texts in self.held_out for text in texts)
            return
        few = sum(map(len, self.train)) < ONE_IN
        for number, text in enumerate(text for texts in self.train for text in texts):
            if few:
                cut = _line_end(text, len(text) - len(text) // ONE_IN)
                yield False, text[:cut]
                yield True, text[cut:]
            else:
                yield number % ONE_IN == ONE_IN // 2, text

    def training_texts(self) -> Iterator[str]:
        """The documents to train on."""
        return (text for held_out, text in self if not held_out)


def open_corpus(sources: Sequence[str], held_out: Sequence[str] = (), column: str = TEXT_COLUMN) -> Corpus:
    """The corpus of these files, folders and data set names; of none, Python's language reference.

    Raises UserError where `open_texts` does, or one is both trained on and held out, or is in two of which a part is
    to be held out.
    """
    opened = open_texts([*held_out, *sources], column)
    kept, train = opened[: len(held_out)], opened[len(held_out) :]
    found = _names(sources, train)
    if both := found.keys() & _names(held_out, kept).keys():
        raise UserError(f"what is held out must not be trained on, {min(both)} is in both")
    if not held_out and (twice := [name for name, times in found.items() if times > 1]):
        raise UserError(f"each source must be given once, {min(twice)} is in two: a copy could be held out")
    if not sources:
        reference, end = language_reference()
        return Corpus([reference], kept or [end])
    return Corpus(train, kept)


def open_texts(sources: Sequence[str], column: str = TEXT_COLUMN) -> list[Texts]:
    """Of these files, folders and data set names.

    Raises UserError where one does not exist, or holds no text that can be read, or none has columns to choose from.
    """
    opened = [open_source(source, column) for source in sources]
    if column != TEXT_COLUMN and not any(isinstance(texts, Column) for texts in opened):
        raise UserError(f"a column must be of a data set, there is none to take {column} from")
    return opened


def _names(sources: Sequence[str], opened: Sequence[Texts]) -> Counter[str]:
    """In how many sources are the text files and data sets, by their full paths or, of data sets, perhaps names."""
    found = Counter[str]()
    for source, texts in zip(sources, opened, strict=True):
        paths = texts.paths if isinstance(texts, Files) else [Path(source).expanduser()]
        found.update({str(path.resolve()) if path.exists() else source for path in paths})
    return found


def open_source(source: str, column: str) -> Texts:
    """The documents of one file, folder or data set name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, column)
    if path.is_file():
        return _data_file(path, column) if path.suffix in DATA else Files([path])
    if path.suffix in TEXT | DATA.keys() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UserError(f"there is no file or folder {source}")
    return _hub(source, column)


def _folder(path: Path, column: str) -> Texts:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _column(open_saved(path), column, str(path))
    files = [p for p in entries_of(path) if p.is_file()]
    texts = [p for p in files if p.suffix in TEXT and not _is_blank(p)]
    data = [p for p in files if p.suffix in DATA]
    if texts and data:
        raise UserError(
            f"the folder {path} must hold text or data files, it holds both: name {data[0].relative_to(path)} or "
            f"{texts[0].relative_to(path)}, or a folder of one kind"
        )
    if not texts and not data:
        kinds = ", ".join(sorted(TEXT | DATA.keys()))
        raise UserError(f"the folder {path} must hold text or data files ({kinds}), it holds none that is not empty")
    if other := [p for p in files if p.suffix not in TEXT | DATA.keys()]:
        what = f"{len(other)} of {len(files)} files in {path} are of other kinds and left alone"
        warnings.warn(f"{what}, such as {other[0].relative_to(path)}", stacklevel=2)
    return Files(texts) if texts else _data_folder(path, data, column)


def _is_blank(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return not any(map(str.strip, lines))


def entries_of(folder: Path) -> list[Path]:
    """What is in a folder and deeper but folders, by name. Hidden ones are not seen, links to folders not followed.

    Raises UserError where a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name) for name in [*names, *links] if not name.startswith(".")]
    return sorted(found)


def _data_folder(path: Path, files: Sequence[Path], column: str) -> Texts:
    """Of files that are named after splits, as train.jsonl and test.jsonl, those of the split train."""
    kinds = {DATA[file.suffix] for file in files}
    if len(kinds) > 1:
        raise UserError(f"data files must be of one kind, {path} holds {', '.join(sorted(kinds))}")
    return _column(_load(f"cannot read {path} as {kinds.pop()}", str(path)), column, str(path))


def _data_file(path: Path, column: str) -> Texts:
    kind = DATA[path.suffix]
    return _column(_load(f"cannot read {path} as {kind}", kind, data_files=[str(path)]), column, str(path))


def _hub(source: str, column: str) -> Texts:
    return _column(open_hub(source), column, source)


def open_hub(source: str, **options: Any) -> Any:
    """The split train of a data set NAME or NAME:CONFIGURATION. Raises UserError where it cannot be loaded."""
    name, _, config = source.partition(":")
    mistake = f"{source} is neither a file, a folder nor a data set that could be loaded"
    return _load(mistake, name, name=config or None, **options)


def open_saved(path: Path) -> Any:
    """The data set that save_to_disk wrote, or the split train of several. Raises UserError where there is none."""
    return _training(require("datasets", "train").load_from_disk(str(path)), str(path))


def _load(mistake: str, path: str, **options: Any) -> Any:
    """datasets.load_dataset's split train. What it shows and raises becomes a UserError that begins with `mistake`."""
    datasets = require("datasets", "train")
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, split="train", **options)
    except Exception as error:  # network, name, format: each has errors of its own, and the reason is the first cause
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise UserError(f"{mistake}: {(str(reason).strip() or type(reason).__name__).splitlines()[0]}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _training(dataset: Any, source: str) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    if "train" not in dataset:
        raise UserError(f"the data set {source} must have a split train, it has {', '.join(dataset)}")
    return dataset["train"]


def _column(dataset: Any, column: str, source: str) -> Column:
    feature = dataset.features.get(column)
    if feature is None or getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise UserError(
            f"the data set {source} must have a column of texts named {column}, it has "
            f"{', '.join(f'{name} ({_type_of(kind)})' for name, kind in dataset.features.items())}: choose one with "
            "--column"
        )
    if not len(dataset):
        raise UserError(f"the data set {source} must hold text, it is empty")
    return Column(dataset, column)


def _type_of(feature: Any) -> str:
    """Of a column, as string or List."""
    return getattr(feature, "dtype", None) or type(feature).__name__


def _line_end(text: str, place: int) -> int:
    """Where the line that holds `place` ends, or the next word where no line does."""
    for pattern in (r"\n", r"\s"):
        found = re.compile(pattern).search(text, place)
        if found and found.end() < len(text):
            return found.end()
    return place
