"""Text as two arrays of full rows: tokenised once, read by every run, small enough to be carried elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...text.collators import MaskedLMCollator, Row
from ...text.tokenizer import load_tokenizer
from ..baseline import Score, unigram
from ..checkpoints import MANIFEST, damage, remove_unfinished, whole_folder
from ..errors import UserError
from ..packing import pieces
from ..prepare import EVALUATION_RATE, check_known, make_tokenizer
from ..recipe import Recipe
from ..rows import EvaluationRows
from ..sources import open_corpus

FACTS = "data.json"
ARRAYS = {False: "train.npy", True: "held_out.npy"}  # by whether it is held out; uint16 where the vocabulary allows
TOGETHER = 4096  # rows that become an array at a time


class FullRows:
    """Rows of exactly `length` tokens, each one piece of a document, in a file that is mapped and not read."""

    def __init__(self, path: Path) -> None:
        self.tokens: NDArray[np.integer] = np.load(path, mmap_mode="r")  # (rows, length)
        self.lengths = np.array([self.tokens.shape[1]])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        return self.tokens[i], self.lengths

    def take(self, which: NDArray[np.integer]) -> NDArray[np.int64]:
        """(rows, length) of these numbers."""
        return self.tokens[which].astype(np.int64)


class FullRowsCollator(MaskedLMCollator):
    """Hides the tokens of a row that `MaskedLMCollator` hides, and lays full rows beside each other."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids and labels (rows, length)."""
        inputs, labels = zip(*(self.mask(row) for row in rows), strict=True)
        return {"input_ids": torch.from_numpy(np.stack(inputs)), "labels": torch.from_numpy(np.stack(labels))}


class Data:
    """What `write` has written."""

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder / "tokenizer")
        self.train, self.held_out = (FullRows(folder / name) for name in ARRAYS.values())
        self.baseline = Score(**self.facts["baseline"])

    def __len__(self) -> int:
        """Tokens to train on."""
        return self.train.tokens.size


def is_prepared(source: str) -> bool:
    """Whether it names a folder that holds such data."""
    return (Path(source).expanduser() / FACTS).is_file()


def write(recipe: Recipe, held_out_rows: int, folder: Path) -> None:
    """Make the folder from the recipe's text, or from another such folder that it names as its one source.

    Whole or not at all. Raises UserError where the text, the tokenizer or the other folder is no good.
    """
    remove_unfinished(folder.parent)
    with whole_folder(folder) as part:
        if len(recipe.sources) == 1 and is_prepared(recipe.sources[0]):
            _copy(Path(recipe.sources[0]).expanduser(), part)
        else:
            _tokenize(recipe, held_out_rows, part)
        _check_fits(json.loads((part / FACTS).read_text(encoding="utf-8")), recipe)


def check_whole(folder: Path) -> None:
    """Raises UserError where the data has changed since it was written."""
    reason = damage(folder)
    if reason:
        raise UserError(
            f"{folder} is damaged ({reason}): choose another --out, or remove {folder.parent} to begin anew"
        )


def _copy(other: Path, part: Path) -> None:
    if reason := damage(other):
        raise UserError(f"{other} is damaged ({reason})")
    shutil.copytree(other, part, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)


def _tokenize(recipe: Recipe, held_out_rows: int, part: Path) -> None:
    corpus = open_corpus(recipe.sources, recipe.held_out, recipe.column)
    tokenizer = make_tokenizer(recipe, corpus)
    for held_out, name in ARRAYS.items():
        texts = (text for is_held_out, text in corpus if is_held_out == held_out)
        found = _array(pieces(texts, tokenizer, recipe.length), recipe.length, len(tokenizer))
        if not len(found):
            raise UserError(
                f"the text must fill a row of {recipe.length} tokens {'to hold out' if held_out else 'to train on'}: "
                "give more text, or --held-out, or a smaller --length"
            )
        check_known(found.reshape(-1), tokenizer)
        if held_out and len(found) > held_out_rows:  # from all documents alike
            found = found[np.linspace(0, len(found) - 1, held_out_rows).round().astype(int)]
        np.save(part / name, found)
    tokenizer.save_pretrained(part / "tokenizer")
    (part / FACTS).write_text(json.dumps(_facts(part, tokenizer), indent=2) + "\n", encoding="utf-8")


def _array(found: Iterable[list[int]], length: int, vocabulary: int) -> NDArray[np.integer]:
    """(rows, length) of the pieces that have the full length: a document's last one seldom has."""
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    full = (piece for piece in found if len(piece) == length)
    blocks = [np.empty((0, length), dtype)]
    while some := list(islice(full, TOGETHER)):
        blocks.append(np.array(some, dtype))
    return np.concatenate(blocks)


def _facts(part: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    train, held_out = (FullRows(part / name) for name in ARRAYS.values())
    baseline = unigram(train.tokens.reshape(-1), EvaluationRows(held_out), FullRowsCollator(tokenizer, EVALUATION_RATE))
    return {
        "length": train.tokens.shape[1], "train_rows": len(train), "held_out_rows": len(held_out),
        "vocabulary": len(tokenizer), "baseline": baseline._asdict(),
    }  # fmt: skip


def _check_fits(facts: dict[str, Any], recipe: Recipe) -> None:
    if facts["length"] != recipe.length:
        raise UserError(f"length must be {facts['length']}, that of the prepared data, got {recipe.length}")
    if facts["train_rows"] < recipe.batch_size:
        raise UserError(
            f"the text must fill at least batch_size = {recipe.batch_size} rows of {recipe.length} tokens to train on, "
            f"it fills {facts['train_rows']}: give more text, or a smaller --batch-size or --length"
        )
