"""Which row is trained on when: a pure function of the seed, so that a resumed run sees what it would have seen."""

from __future__ import annotations

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
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, i: int) -> Row:
        epoch, place = divmod(i, len(self.rows))
        return Row(*self.rows[int(self._shuffled(epoch)[place])], key=(self.seed, i))

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self._order[1]


class EvaluationRows(Dataset):
    """Every row once, with the same masks every time."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return Row(*self.rows[i], key=(i,))
