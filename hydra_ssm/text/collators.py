"""Rows of packed documents to one masked batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not to be predicted


@dataclass(frozen=True)
class Row:
    """Documents back to back."""

    tokens: NDArray[np.integer]  # (T,)
    lengths: NDArray[np.integer]  # (documents,) of each, T in sum
    key: tuple[int, ...]  # seeds the row's masks: the same key, the same masks


class MaskedLMCollator:
    """Hides tokens and lays all rows end to end: no padding, and nothing is predicted across documents.

    Each token but the special ones is chosen with probability `rate`; a chosen one becomes [MASK] (80 %), any other
    token (10 %) or stays (10 %), and is to be predicted. A row's masks depend on its key alone: not on the batch it is
    in, on other processes or on how often the run was interrupted. At least one token of a row is chosen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rate: float) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"the rate of masked tokens must be above 0 and at most 1, got {rate}")
        self.rate, self.mask_token = rate, int(tokenizer.mask_token_id)
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        self.ordinary = np.flatnonzero(~self.special)  # what may stand in for a chosen token

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """input_ids and labels (1, T), and cu_seqlens (documents + 1,) of all rows' documents, int32.

        Raises ValueError where there is no row.
        """
        if not rows:
            raise ValueError("a batch needs at least one row, got none")
        inputs, labels = zip(*(self.mask(row) for row in rows), strict=True)
        lengths = np.concatenate([row.lengths for row in rows])
        return {
            "input_ids": torch.from_numpy(np.concatenate(inputs))[None],
            "labels": torch.from_numpy(np.concatenate(labels))[None],
            "cu_seqlens": torch.from_numpy(np.concatenate([[0], lengths.cumsum()]).astype(np.int32)),
        }

    def mask(self, row: Row) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(inputs, labels) of one row, (T,) each."""
        tokens = row.tokens.astype(np.int64)
        random = np.random.default_rng(row.key)
        draw, kind, other = random.random(len(tokens)), random.random(len(tokens)), random.random(len(tokens))
        draw[self.special[tokens]] = 2.0  # never
        chosen = draw < self.rate
        if not chosen.any():
            chosen = draw == min(draw.min(initial=2.0), 1.0)
        labels = np.where(chosen, tokens, IGNORED)
        replacement = self.ordinary[(other * len(self.ordinary)).astype(np.int64)]
        inputs = np.where(kind < 0.8, self.mask_token, np.where(kind < 0.9, replacement, tokens))
        return np.where(chosen, inputs, tokens), labels
