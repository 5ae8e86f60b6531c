"""Which row is trained on when: a pure function of the seed, so that a resumed run sees what it would have seen."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..text.collators import Row


class Rows(Protocol):
    """What text was made into: `rows[i]` is (tokens, length of each piece)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]: ...


class TrainingRows(Dataset):
    """All rows of a run in its order: `total` of them, in passes over the data, each shuffled anew."""

    def __init__(self, rows: Rows, total: int, seed: int) -> None:
        self.rows, self.total, self.seed = rows, total, seed
        self._order: tuple[int, Shuffle] | None = None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> Row:
        epoch, place = divmod(i, len(self.rows))
        return Row(*self.rows[self._shuffled(epoch)[place]], key=(self.seed, i))

    def _shuffled(self, epoch: int) -> Shuffle:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Shuffle(len(self.rows), (self.seed, epoch))
        return self._order[1]


class Shuffle:
    """A random order of 0 .. n - 1 that is computed place by place, so that it needs no memory.

    A table of C4's rows would be 3 GB in each process and each of its loaders. This is a Feistel network: a place is a
    pair of numbers below `side`, each of which is moved in turn by a random number that the other one stands for. Its
    places are up to 2 * side more than n; those are walked over.
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: tuple[int, ...]) -> None:
        self.n, self.side = n, math.isqrt(max(n - 1, 0)) + 1
        self.moves = np.random.default_rng(seed).integers(self.side, size=(self.ROUNDS, self.side), dtype=np.uint32)

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.n:
            raise IndexError(f"a place must be at least 0 and below {self.n}, got {place}")
        found = self._moved(place)
        while found >= self.n:
            found = self._moved(found)
        return found

    def _moved(self, place: int) -> int:
        one, other = divmod(place, self.side)
        for move in self.moves:
            one, other = other, (one + int(move[other])) % self.side
        return one * self.side + other


class EvaluationRows(Dataset):
    """Rows with the same masks every time: each once, or `most` of them, evenly spread."""

    def __init__(self, rows: Rows, most: int | None = None) -> None:
        self.rows, self.count = rows, len(rows) if most is None else min(len(rows), most)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Row:
        place = i * len(self.rows) // self.count
        return Row(*self.rows[place], key=(place,))
