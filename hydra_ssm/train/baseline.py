"""What knowing the words' frequencies alone achieves: a model that learned anything does better."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..text.collators import IGNORED, MaskedLMCollator
from .rows import EvaluationRows


class Score(NamedTuple):
    """How well hidden tokens are predicted."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share whose likeliest token is right
    tokens: int  # that were to be predicted


def unigram(training_tokens: NDArray[np.integer], rows: EvaluationRows, collator: MaskedLMCollator) -> Score:
    """The training text's token frequencies, one added to each, on the tokens that the evaluation hides."""
    counts = np.bincount(training_tokens, minlength=len(collator.special)).astype(np.float64) + 1
    counts[collator.special] = 0  # never hidden
    hidden = np.concatenate([_hidden(rows, i, collator) for i in range(len(rows))])
    probability = counts / counts.sum()
    return Score(float(-np.log(probability[hidden]).mean()), float((hidden == counts.argmax()).mean()), len(hidden))


def _hidden(rows: EvaluationRows, i: int, collator: MaskedLMCollator) -> NDArray[np.int64]:
    labels = collator.mask(rows[i])[1]
    return labels[labels != IGNORED]
