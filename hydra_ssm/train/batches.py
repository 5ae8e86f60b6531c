"""Batches of one shape: rows, and the places of their hidden tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..text.collators import IGNORED, MaskedLMCollator, Row


@dataclass(frozen=True)
class Batch:
    """Rows with hidden tokens, in shapes that are the same for every batch."""

    input_ids: Tensor  # (rows, length)
    places: Tensor  # (capacity,) of the hidden tokens in the rows laid end to end; 0 where there are no more
    labels: Tensor  # (capacity,) their tokens; IGNORED where there are no more
    count: Tensor  # () of the hidden tokens of the whole step, float32


class Rows(Protocol):
    """Text cut into rows of one length."""

    def __len__(self) -> int: ...
    def take(self, which: NDArray[np.integer]) -> NDArray[np.int64]: ...  # (rows, length) of these numbers


class Batches:
    """The batch of each step: a function of seed and step alone, so that a resumed run sees what it would have seen.

    Args:
        size: rows of a step.
        parts: that it is dealt into, one after the other.
    """

    def __init__(self, rows: Rows, collator: MaskedLMCollator, size: int, seed: int, parts: int = 1) -> None:
        self.rows, self.collator, self.size, self.seed, self.parts = rows, collator, size, seed, parts
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getitem__(self, step: int) -> list[Batch]:
        """The parts of a step."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        epochs, within = np.divmod(places, len(self.rows))
        tokens = self.rows.take(np.array([self._order(int(e))[w] for e, w in zip(epochs, within, strict=True)]))
        inputs, labels = self.collator.mask(together(tokens, key=(self.seed, step)))
        capacity = _capacity(tokens.size // self.parts, self.collator.rate)
        found = [_hidden(own, capacity) for own in labels.reshape(self.parts, -1)]
        count = torch.tensor(float(sum((own != IGNORED).sum() for _, own in found)))
        return [
            Batch(torch.from_numpy(ids), torch.from_numpy(where), torch.from_numpy(what), count)
            for ids, (where, what) in zip(inputs.reshape(self.parts, -1, tokens.shape[1]), found, strict=True)
        ]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))


def together(tokens: NDArray[np.int64], key: tuple[int, ...]) -> Row:
    """Rows as one whose tokens are hidden together, which is quicker."""
    return Row(tokens.reshape(-1), np.array([tokens.size]), key)


def _capacity(tokens: int, rate: float) -> int:
    """Hidden tokens that there are room for: more than are ever drawn."""
    spread = (tokens * rate * (1 - rate)) ** 0.5
    return min(tokens, int(-(-(tokens * rate + 6 * spread) // 64) * 64))


def _hidden(labels: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places of the labelled tokens, their labels)."""
    hidden = np.flatnonzero(labels != IGNORED)[:capacity]
    where, what = np.zeros(capacity, np.int64), np.full(capacity, IGNORED)
    where[: len(hidden)], what[: len(hidden)] = hidden, labels[hidden]
    return where, what
