"""What is known of hidden tokens without a look at any other: a model that is no better reads no context yet."""

from __future__ import annotations

import numpy as np

from ...text.collators import IGNORED
from ..baseline import token_counts
from .data import TRAIN, Data

FREQUENCIES, PLACE = "word frequencies", "word frequencies and the token in the hidden place"


def without_context(data: Data, name: str, length: int) -> dict[str, float]:
    """Losses (nats) of a held-out text in rows of this length, by the word frequencies of the training text.

    PLACE is the most that can be known from what stands in a hidden token's place: [MASK] says nothing; any other
    token y is the hidden one as often as y itself is chosen and stays, else a random one in its stead.
    """
    collator = data.collator
    counts = token_counts(data.tokens(TRAIN), len(collator.special)) + 1.0
    counts[collator.special] = 0  # never hidden
    share, random = counts / counts.sum(), 1 / len(collator.ordinary)
    inputs, labels = (t.numpy() for t in data.evaluation(name, length))
    hidden = labels != IGNORED
    seen, wanted = inputs[hidden], labels[hidden]
    by_frequency = share[wanted]
    alone = (share[seen] * (seen == wanted) + by_frequency * random) / (share[seen] + random)  # share[MASK] is 0
    return {FREQUENCIES: -float(np.log(by_frequency).mean()), PLACE: -float(np.log(alone).mean())}
