"""Text as arrays of tokens, made once, of which rows of any length are cut: small enough to be carried elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...text.collators import MaskedLMCollator
from ...text.tokenizer import load_tokenizer
from ..batches import together
from ..checkpoints import damage, whole_folder
from ..errors import UserError
from ..finetune.tasks import TASKS, plain
from ..packing import pieces
from ..prepare import EVALUATION_RATE
from ..sources import open_corpus, open_texts

FACTS, GLUE, TOKENIZER, TRAIN = "data.json", "glue", "tokenizer", "train"
LONG = 1 << 20  # tokens of a piece that is put back together
UNKNOWN_WORD = re.compile(r"<unk>")
SPACED = re.compile(r" @(.)@ ")  # as WikiText writes the hyphens and points inside words and numbers


class Rows:
    """[CLS], consecutive tokens of one document, [SEP]: all rows of one length that are full."""

    def __init__(self, folder: Path, name: str, length: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokens: NDArray[np.integer] = np.load(folder / f"{name}.npy", mmap_mode="r")
        ends = np.load(folder / f"{name}-ends.npy")
        starts = [np.arange(a, b - (length - 3), length - 2) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.starts: NDArray[np.int64] = np.concatenate(starts) if starts else np.empty(0, np.int64)
        self.length, self.cls, self.sep = length, tokenizer.cls_token_id, tokenizer.sep_token_id
        if not len(self.starts):
            raise UserError(f"the text {name} must fill a row of {length} tokens, it has {len(self.tokens)} tokens")

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, which: NDArray[np.integer]) -> NDArray[np.int64]:
        """(rows, length) of these numbers."""
        found = np.empty((len(which), self.length), np.int64)
        found[:, 0], found[:, -1] = self.cls, self.sep
        found[:, 1:-1] = self.tokens[self.starts[which][:, None] + np.arange(self.length - 2)]
        return found


class Data:
    """What `write` has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} must hold what hydra-ssm compare prepare wrote: {error}") from error
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder / TOKENIZER)
        self.collator = MaskedLMCollator(self.tokenizer, EVALUATION_RATE)  # of held-out text
        self.evaluation = cache(self._evaluation)

    def tokens(self, name: str) -> NDArray[np.integer]:
        """All of a text."""
        tokens: NDArray[np.integer] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return tokens

    def rows(self, name: str, length: int) -> Rows:
        """Of a text."""
        return Rows(self.folder, name, length, self.tokenizer)

    def _evaluation(self, name: str, length: int, most: int | None = None) -> tuple[Tensor, Tensor]:
        """(inputs, labels), (rows, length) each: from all of a held-out text alike, the same tokens hidden always.

        most: tokens; None for all of the text.
        """
        rows = self.rows(name, length)
        count = len(rows) if most is None else min(len(rows), max(1, most // length))
        tokens = rows.take(np.linspace(0, len(rows) - 1, count).round().astype(int))
        inputs, labels = self.collator.mask(together(tokens, key=(0,)))
        return torch.from_numpy(inputs.reshape(tokens.shape)), torch.from_numpy(labels.reshape(tokens.shape))


def write(
    folder: Path, train: Sequence[str], held_out: Mapping[str, Sequence[str]], tokenizer: str, glue: str | None
) -> dict[str, Any]:
    """Fill the folder: the tokens of each text, the tokenizer, and of GLUE the files that are read. Returns its facts.

    Whole or not at all. Raises UserError where text, tokenizer or tasks are no good.
    """
    try:
        words = load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    texts = {TRAIN: open_corpus(train, [s for sources in held_out.values() for s in sources]).train}
    texts |= {name: open_texts(sources) for name, sources in held_out.items()}
    with whole_folder(folder) as part:
        facts: dict[str, Any] = {"vocabulary": len(words), "texts": {}}
        for name, found in texts.items():
            tokens, ends = _tokens((plainly(text) for documents in found for text in documents), words)
            np.save(part / f"{name}.npy", tokens)
            np.save(part / f"{name}-ends.npy", ends)
            facts["texts"][name] = {"tokens": len(tokens), "documents": len(ends)}
        words.save_pretrained(part / TOKENIZER)
        if glue is not None:
            facts["glue"] = _copy_tasks(Path(glue), part / GLUE)
        (part / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def plainly(text: str) -> str:
    """Text as others write it where WikiText has marks of its own; an unknown word is [UNK], which is never hidden."""
    return SPACED.sub(r"\1", UNKNOWN_WORD.sub("[UNK]", text))


def _tokens(texts: Iterable[str], words: PreTrainedTokenizerBase) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """(tokens of all documents, where each ends)."""
    dtype = np.uint16 if len(words) <= 1 << 16 else np.uint32
    parts, total = [np.empty(0, dtype)], 0
    ends: list[int] = []
    for text in texts:
        for piece in pieces([text], words, LONG):
            parts.append(np.array(piece[1:-1], dtype))
            total += len(piece) - 2
        if total > (ends[-1] if ends else 0):
            ends.append(total)
    return np.concatenate(parts), np.array(ends, np.int64)


def _copy_tasks(glue: Path, target: Path) -> list[str]:
    """The files for training and development of every task that is there."""
    found = []
    for folder in sorted(p for p in glue.iterdir() if p.is_dir()):
        task = next((name for name in TASKS if plain(name) == plain(folder.name)), None)
        files = [] if task is None else [*folder.glob("train.tsv"), *folder.glob("dev*.tsv")]
        if task is not None and files:
            (target / task).mkdir(parents=True)
            for file in files:
                shutil.copy(file, target / task / file.name)
            found.append(task)
    if not found:
        raise UserError(f"{glue} must hold a folder for each of GLUE's tasks, it holds none")
    return found


def check_whole(folder: Path) -> None:
    """Raises UserError where the data has changed since it was written."""
    if reason := damage(folder):
        raise UserError(f"{folder} is damaged ({reason}): prepare it again")
