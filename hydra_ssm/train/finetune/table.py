"""A user's own rows, from CSV, TSV or JSONL, and what they seem to be for."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..sources import HALF

TASKS = ("classification", "regression", "tagging")
MOST_CLASSES = 20  # of whole numbers; more are taken for measurements
TEXT = (
    "text", "sentence", "review", "comment", "message", "content", "body", "title", "description", "document",
    "question", "query", "input", "tweet", "abstract",
)  # fmt: skip
PAIRS = (
    ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"),
    ("sentence_a", "sentence_b"), ("premise", "hypothesis"), ("question", "sentence"), ("question", "answer"),
    ("query", "passage"), ("query", "document"),
)  # fmt: skip
LABEL = (
    "label", "labels", "class", "category", "target", "gold_label", "sentiment", "intent", "topic", "score", "rating",
    "stars", "value", "y", "output",
)  # fmt: skip
WORDS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels", "label")
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What is to be learned from which columns."""

    task: str
    texts: tuple[str, ...]  # one column, or two whose texts belong together
    label: str

    def __str__(self) -> str:
        """As "classification of pairs of first and second by label"."""
        what = f"pairs of {self.texts[0]} and {self.texts[1]}" if len(self.texts) == 2 else self.texts[0]
        return f"{self.task} of {what} by {self.label}"


@dataclass
class Rows:
    """Texts and labels of the rows that have both, and what was left out."""

    texts: list[tuple[Any, ...]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)  # strings, floats, or lists of strings
    remarks: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of a file by the names of their columns, and remarks about lines that are no rows.

    Raises UserError where there is no such file, its kind is unknown, or it has no row.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"the data must be a file of {', '.join(readers)}, got {path}")
    rows: list[Row] = []
    broken: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in readers[path.suffix.lower()](file, path):
                if row is None:
                    broken.append(line)
                else:
                    rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, it is not: {error.reason}") from error
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from error
    named = f"{', '.join(map(str, broken[:5]))}{', ...' if len(broken) > 5 else ''}"
    if not rows:
        why = f", but {len(broken)} lines of another number of cells than the first ({named})" if broken else ""
        raise UserError(f"{path} must hold rows, it holds none{why}")
    return rows, [f"{path}: {len(broken)} broken lines left out ({named})"] if broken else []


def _csv(file: Any, path: Path) -> Iterator[tuple[int, Row | None]]:
    """With quotes as CSV has them; a TSV file has none. Lines are split at semicolons where the first has no comma."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        header = re.sub('"[^"]*"', "", file.readline())
        file.seek(0)
        reader = csv.reader(file, delimiter=";" if ";" in header and "," not in header else ",", strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise UserError(f"{path} must begin with the names of its columns, it does not: {error}") from error
    if twice := [name for name, times in Counter(columns).items() if times > 1]:
        raise UserError(f"{path} must name each column once, it names {twice[0]!r} more than once")
    first = reader.line_num + 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}: the quote that opens in line {first} must close in its cell, up to line {reader.line_num} "
                f"there are errors ({error}): write a quote inside of a cell twice"
            ) from error
        if cells is None:
            return
        whole = len(cells) == len(columns)
        if not whole and reader.line_num > first:
            raise UserError(
                f"{path}: the quote that opens in line {first} must close in its cell, up to line {reader.line_num} "
                f"there are {len(cells)} cells for {len(columns)} columns: write a quote inside of a cell twice"
            )
        if cells:
            yield first, dict(zip(columns, cells, strict=True)) if whole else None
        first = reader.line_num + 1


def _jsonl(file: Any, path: Path) -> Iterator[tuple[int, Row | None]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else None


def guess(rows: Sequence[Row], task: str | None, texts: Sequence[str], label: str | None) -> Problem:
    """What the rows seem to be for, but for what is given. Raises UserError where that is not clear."""
    columns = list(dict.fromkeys(name for row in rows[:1000] for name in row))
    for name in [*texts, *([label] if label else [])]:
        if name not in columns:
            raise UserError(f"there must be a column {name}, the columns are {', '.join(columns)}")
    if len(texts) > 2 or len(set(texts)) < len(texts) or label in texts:
        raise UserError(f"one column or two must hold texts and another the label, got {', '.join(texts)} and {label}")
    by_name = {name.lower(): name for name in reversed(columns)}
    if task == "tagging" or (task is None and _has_tags(rows, by_name, texts, label)):
        words = texts or _known(by_name, (*WORDS, *TEXT), (label,))
        tags = [label] if label else _known(by_name, TAGS, words)
        if len(words) != 1 or not tags:
            raise UserError(f"name the column of words with --text and that of tags with --label: {', '.join(columns)}")
        return Problem("tagging", tuple(words), tags[0])
    label = label or _guess_label(rows, columns, by_name, texts)
    texts = texts or _guess_texts(rows, columns, by_name, label)
    return Problem(task or _kind([row.get(label) for row in rows]), tuple(texts), label)


def _known(by_name: dict[str, str], names: Sequence[str], but: Sequence[str | None]) -> list[str]:
    """The first of the names that is a column, in a list."""
    return [by_name[name] for name in names if name in by_name and by_name[name] not in but][:1]


def _has_tags(rows: Sequence[Row], by_name: dict[str, str], texts: Sequence[str], label: str | None) -> bool:
    """Whether a row has a tag for each word: lists in JSONL, or the columns that such data has in CSV."""
    words = list(texts) or _known(by_name, WORDS, (label,))
    tags = [label] if label else _known(by_name, TAGS, words)
    if len(words) != 1 or not tags:
        return False
    pairs = [(split(row.get(words[0])), split(row.get(tags[0]))) for row in rows[:100]]
    lists = any(isinstance(row.get(tags[0]), list) for row in rows[:100])
    named = words[0].lower() in WORDS and any(len(found) > 1 for _, found in pairs)
    alike = sum(len(first) == len(second) for first, second in pairs)
    return (lists or named) and 2 * alike > len(pairs)  # single rows may have a tag too few: they are left out


def split(value: Any) -> list[str]:
    """Words or tags: a list's, or what spaces separate."""
    return [HALF.sub("\ufffd", str(item)) for item in value] if isinstance(value, list) else _text(value).split()


def _guess_label(rows: Sequence[Row], columns: Sequence[str], by_name: dict[str, str], texts: Sequence[str]) -> str:
    if known := _known(by_name, LABEL, texts):
        return known[0]
    last = [name for name in columns if name not in texts][-1:]
    values = {_text(row.get(last[0])) for row in rows} if last else set()
    if not 2 <= len(values) <= max(2, len(rows) // 2) or len(columns) < 2:
        raise UserError(f"name the column of the label with --label, the columns are {', '.join(columns)}")
    return last[0]


def _guess_texts(rows: Sequence[Row], columns: Sequence[str], by_name: dict[str, str], label: str) -> list[str]:
    """Two that are known to go together, one that is known, or the one with the longest texts."""
    for first, second in PAIRS:
        if {first, second} <= by_name.keys() and label not in (by_name[first], by_name[second]):
            return [by_name[first], by_name[second]]
    if known := _known(by_name, TEXT, (label,)):
        return known
    sizes = {name: sum(len(_text(row.get(name))) for row in rows[:1000]) for name in columns if name != label}
    if not sizes:
        raise UserError(f"there must be a column of texts beside the label, the columns are {', '.join(columns)}")
    return [max(sizes, key=lambda name: sizes[name])]


def _kind(values: Sequence[Any]) -> str:
    """Regression where all labels are numbers, and not a few whole ones; else classification."""
    numbers = [as_number(value) for value in values if _text(value)]
    if not numbers or any(number is None for number in numbers):
        return "classification"
    whole = all(number is not None and number.is_integer() for number in numbers)
    return "classification" if whole and len(set(numbers)) <= MOST_CLASSES else "regression"


def _text(value: Any) -> str:
    """A cell's text; "" for one that is empty, as JSON's null and NaN are."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else HALF.sub("\ufffd", str(value)).strip()


def as_number(value: Any) -> float | None:
    """What a cell says, if that is a finite number; 1_0 is none, though Python reads it."""
    text = _text(value)
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def take(rows: Sequence[Row], problem: Problem, source: object) -> Rows:
    """Texts and labels of the rows that have both, those that have not counted. Raises UserError where none has."""
    found, counts = Rows(), Counter[str]()
    for row in rows:
        texts, label, fault = _example(row, problem)
        if fault:
            counts[fault] += 1
        else:
            found.texts.append(texts)
            found.labels.append(label)
    found.remarks = [f"{source}: {count} of {len(rows)} rows left out, {what}" for what, count in counts.items()]
    if not len(found):
        raise UserError(f"{source} must hold rows with text and label, it holds none: {'; '.join(found.remarks)}")
    return found


def _example(row: Row, problem: Problem) -> tuple[tuple[Any, ...], Any, str]:
    """(texts, label, why it is none)."""
    label: Any
    if problem.task == "tagging":
        words, label = split(row.get(problem.texts[0])), split(row.get(problem.label))
        fault = "without words" if not words else "without a label" if not label else ""
        return (words,), label, fault or ("with more or fewer tags than words" if len(words) != len(label) else "")
    texts, label = tuple(_text(row.get(name)) for name in problem.texts), _text(row.get(problem.label))
    fault = "without a label" if not label else "without text" if not all(texts) else ""
    if isinstance(row.get(problem.label), list | dict):
        fault = "whose label is a list: --task tagging takes those"
    if problem.task == "regression" and not fault:
        comma = as_number(label.replace(",", ".")) is not None
        label = as_number(label)
        fault = "" if label is not None else f"whose label is not a number{comma * ': write 0.5 for 0,5'}"
    return texts, label, fault
