"""What knowing the words' frequencies alone achieves: a model that learned anything does better."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..text.collators import IGNORED, MaskedLMCollator
from .data.shards import TokenSequence
from .rows import EvaluationRows

SLICE = 1 << 20  # tokens that are counted together


class Score(NamedTuple):
    """How well hidden tokens are predicted."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share whose likeliest token is right
    tokens: int  # that were to be predicted


def unigram(
    training_tokens: NDArray[np.integer] | TokenSequence, rows: EvaluationRows, collator: MaskedLMCollator
) -> Score:
    """The training text's token frequencies, one added to each, on the tokens that the evaluation hides."""
    counts = token_counts(training_tokens, len(collator.special)) + 1.0
    counts[collator.special] = 0  # never hidden
    hidden = np.concatenate([_hidden(rows, i, collator) for i in range(len(rows))])
    probability = counts / counts.sum()
    return Score(float(-np.log(probability[hidden]).mean()), float((hidden == counts.argmax()).mean()), len(hidden))


def token_counts(tokens: NDArray[np.integer] | TokenSequence, vocabulary: int) -> NDArray[np.int64]:
    """(vocabulary,) how often each token occurs; np.bincount copies its argument, so it gets slices."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for start in range(0, len(tokens), SLICE):
        counts += np.bincount(tokens[start : start + SLICE], minlength=vocabulary)
    return counts


def _hidden(rows: EvaluationRows, i: int, collator: MaskedLMCollator) -> NDArray[np.int64]:
    labels = collator.mask(rows[i])[1]
    return labels[labels != IGNORED]
