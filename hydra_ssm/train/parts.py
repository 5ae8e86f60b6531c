"""Which process trains on which rows: every step has the same rows, in the same order, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..text.collators import IGNORED, Row
from .dropout import words_of

Collator = Callable[[Sequence[Row]], dict[str, Tensor]]


def dealt(rows: range, parts: int) -> list[range]:
    """Rows in parts whose sizes differ by one at most; some are empty where there are more parts than rows."""
    ends = [rows.start + len(rows) * i // parts for i in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


class Parts(Sampler[list[int]]):
    """The rows of one process: for each step as many lists as the step is computed in, one after the other."""

    def __init__(self, steps: int, batch_size: int, accumulate: int, rank: int, size: int) -> None:
        self.steps, self.batch_size, self.accumulate, self.rank, self.size = steps, batch_size, accumulate, rank, size

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            rows = range(step * self.batch_size, (step + 1) * self.batch_size)
            for part in dealt(rows, self.accumulate):
                yield list(dealt(part, self.size)[self.rank])


class Batches:
    """Collates rows without padding, with the random numbers of their tokens as `words`.

    No row at all becomes one token of which nothing is to be predicted: a process that has nothing to do takes part in
    what all processes do together.
    """

    def __init__(self, collator: Collator, filler: int) -> None:
        self.collator, self.filler = collator, filler

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The collator's batch and `words`, of the shape of input_ids."""
        given = rows or [Row(np.array([self.filler]), np.array([1]), key=(0,))]
        batch = self.collator(given)
        if not rows:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        batch["words"] = words_of(given).view(batch["input_ids"].shape)
        return batch
