"""What is reported beside a model's accuracy: of answers that take no training, or little."""

from __future__ import annotations

import numpy as np
import torch

from .sources import Digits, Part


def logistic_regression(train: Part, held_out: Part) -> float:
    """Accuracy of scikit-learn's logistic regression on the pixels of digits, the same held out."""
    from sklearn.linear_model import LogisticRegression

    def table(part: Part) -> tuple[np.ndarray, list[int]]:
        assert isinstance(part.source, Digits)
        pixels = part.source.values[part.index].reshape(len(part), -1) / 16
        return pixels, [part.source.labels[i] for i in part.index]

    x, y = table(train)
    model = LogisticRegression(max_iter=2000).fit(x, y)
    return float(model.score(*table(held_out)))


def most_frequent(train: Part, held_out: Part) -> float:
    """Accuracy of always saying the commonest class."""
    counts = torch.bincount(torch.tensor([train.source.labels[i] for i in train.index]))
    labels = [held_out.source.labels[i] for i in held_out.index]
    return labels.count(int(counts.argmax())) / len(labels)
