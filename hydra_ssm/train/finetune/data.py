"""GLUE's examples: from the TSV files as they are distributed, or from a Hugging Face data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..._extras import require
from ..errors import UserError
from .tasks import INDEX, LABELS, MNLI, Task, plain

COLA = ("source", "label", "mark", "sentence")  # CoLA's files have no header, but for the test set's
NAMED = 5  # lines that a remark names
Label = int | float


@dataclass
class Examples:
    """One text or two each, with labels if they have been told; and what was left out of them."""

    first: list[str] = field(default_factory=list)
    second: list[str] | None = None
    labels: list[Any] | None = None  # an int each, a float where labels are numbers, a list for tags
    index: list[str] = field(default_factory=list)  # by which a submission names them
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class TaskData:
    """Where a task's parts come from; each is read when it is asked for."""

    train: Callable[[], Examples]
    dev: dict[str, Callable[[], Examples]]  # by what ends the metrics' names
    test: dict[str, Callable[[], Examples]]  # by the name of the submission; none where there is no test set


def find(data: str, task: Task) -> TaskData | str:
    """The task's data in a folder, or in a data set of the Hugging Face Hub; or why it is not there.

    Raises UserError where `data` is no folder and cannot be a data set's name.
    """
    path = Path(data).expanduser()
    if not path.is_dir():
        if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data):
            raise UserError(f"--data must be a folder with GLUE's tasks or the name of a data set, got {data}")
        return _hub(data, task)
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and plain(p.name) == plain(task.name)]
    if not folders:
        return f"there is no folder {path / task.name}"
    folder = folders[0]
    if (folder / "dataset_dict.json").is_file():
        return _splits(require("datasets", "train").load_from_disk(str(folder)), task, str(folder))
    parquet = {split: sorted(map(str, folder.glob(f"{split}[-.]*parquet"))) for split in _SPLITS}
    if parquet["train"]:
        files = {split: found for split, found in parquet.items() if found}
        return _splits(require("datasets", "train").load_dataset("parquet", data_files=files), task, str(folder))
    return _tsv_folder(folder, task)


_SPLITS = (
    "train", "validation", "validation_matched", "validation_mismatched", "test", "test_matched", "test_mismatched"
)  # fmt: skip


def _tsv_folder(folder: Path, task: Task) -> TaskData | str:
    def part(path: Path, labelled: bool) -> Callable[[], Examples]:
        return lambda: read_tsv(path, task, labelled)

    dev = {}
    for ending, names in task.dev.items():
        if found := next((folder / name for name in names if (folder / name).is_file()), None):
            dev[ending] = part(found, True)
    if not (folder / "train.tsv").is_file() or not dev:
        wanted = "train.tsv" if dev else next(iter(task.dev.values()))[0]
        return f"there is no {folder / wanted}"
    test = {name: part(folder / file, False) for name, file in task.test.items() if (folder / file).is_file()}
    return TaskData(part(folder / "train.tsv", True), dev, test)


def read_tsv(path: Path, task: Task, labelled: bool) -> Examples:
    """The examples of a file: no quotes, one line each. Lines that have not its columns are counted and named.

    Raises UserError where a column is missing, or no line is an example.
    """
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n")
    header = _header(lines[0], task)
    begins = 0 if header == COLA else 1
    texts = [_column(header, names, path) for names in task.texts]
    label = _column(header, LABELS, path) if labelled else None
    index = next((header.index(name) for name in INDEX if name in header), None)
    examples = Examples(second=[] if len(texts) == 2 else None, labels=[] if labelled else None)
    broken, unlabelled = [], []
    for number, line in enumerate(lines[begins:], start=begins + 1):
        try:
            cells = line.decode().removesuffix("\r").split("\t")
        except UnicodeDecodeError:
            cells = []
        if len(cells) != len(header):
            broken.append(number)
            continue
        value = None if label is None else _label(cells[label], task)
        if labelled and value is None:
            unlabelled.append(number)
            continue
        _add(examples, [cells[i] for i in texts], value, str(number - begins - 1) if index is None else cells[index])
    for found, what in ((broken, f"broken, not of {len(header)} columns"), (unlabelled, "without one of the labels")):
        if found:
            examples.remarks.append(f"{path}: {_named(found)} left out, {what}")
    if not len(examples):
        raise UserError(f"{path} must hold examples, it holds none: {'; '.join(examples.remarks) or 'it is empty'}")
    return examples


def _header(line: bytes, task: Task) -> tuple[str, ...]:
    cells = tuple(line.decode(errors="replace").removesuffix("\r").split("\t"))
    return COLA if task.name == "CoLA" and not set(cells) & {"sentence", *INDEX} else cells


def _column(header: Sequence[str], names: Iterable[str], source: object) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise UserError(f"{source} must have a column {' or '.join(names)}, it has {', '.join(header)}")


def _label(word: str, task: Task) -> Label | None:
    if task.classes:
        return task.words.index(word) if word in task.words else None
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None


def _add(examples: Examples, texts: Sequence[str], label: Label | None, index: str) -> None:
    examples.first.append(texts[0])
    if examples.second is not None:
        examples.second.append(texts[1])
    if examples.labels is not None:
        examples.labels.append(label)
    examples.index.append(index)


def _named(numbers: Sequence[int]) -> str:
    """As "2 lines (7, 9)"."""
    more = ", ..." if len(numbers) > NAMED else ""
    return f"{len(numbers)} line{'s' * (len(numbers) > 1)} ({', '.join(map(str, numbers[:NAMED]))}{more})"


def _hub(name: str, task: Task) -> TaskData | str:
    datasets = require("datasets", "train")
    try:
        return _splits(datasets.load_dataset(name, task.hub), task, f"{name}:{task.hub}")
    except UserError:
        raise
    except Exception as error:  # network, name, configuration: each has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the data set {name}:{task.hub} could not be loaded: {reason}"


def _splits(splits: Any, task: Task, source: str) -> TaskData | str:
    def part(split: str, labelled: bool) -> Callable[[], Examples]:
        return lambda: _from_dataset(splits[split], task, labelled, f"{source}, {split}")

    two = task.name == MNLI
    dev = {"_m": "validation_matched", "_mm": "validation_mismatched"} if two else {"": "validation"}
    test = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"} if two else {task.name: "test"}
    dev = {ending: split for ending, split in dev.items() if split in splits}
    if "train" not in splits or not dev:
        return f"{source} must have the splits train and validation, it has {', '.join(splits)}"
    return TaskData(
        part("train", True),
        {ending: part(split, True) for ending, split in dev.items()},
        {name: part(split, False) for name, split in test.items() if split in splits},
    )


def _from_dataset(dataset: Any, task: Task, labelled: bool, source: str) -> Examples:
    """Its labels are numbers already, in the order of the task's classes, and -1 where there is none."""
    header = dataset.column_names
    names = [header[_column(header, names, source)] for names in task.texts]
    label = header[_column(header, LABELS, source)] if labelled else None
    index = next((name for name in INDEX if name in header), None)
    examples = Examples(second=[] if len(names) == 2 else None, labels=[] if labelled else None)
    left_out = 0
    for number, row in enumerate(dataset):
        value = None if label is None else row[label]
        if labelled and (value is None or value < 0):
            left_out += 1
            continue
        value = float(value) if value is not None and not task.classes else value
        _add(examples, [row[name] for name in names], value, str(number if index is None else row[index]))
    if left_out:
        examples.remarks.append(f"{source}: {left_out} rows without a label left out")
    if not len(examples):
        raise UserError(f"{source} must hold examples with labels, it holds none")
    return examples
