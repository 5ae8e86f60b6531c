"""How well predictions meet labels: GLUE's metrics, as scikit-learn and SciPy compute them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..._extras import require

Numbers = NDArray[np.floating] | NDArray[np.integer]
NEEDED = ("scipy.stats", "sklearn.metrics")


def check_installed() -> None:
    """Raises ImportError, with what to install, where SciPy or scikit-learn is missing."""
    for name in NEEDED:
        require(name, "train")


def accuracy(labels: Numbers, found: Numbers) -> float:
    """The share of labels that were found."""
    return float(require("sklearn.metrics", "train").accuracy_score(labels, found))


def f1(labels: Numbers, found: Numbers) -> float:
    """Of class 1: the harmonic mean of precision and recall, 0 where neither is defined."""
    return float(require("sklearn.metrics", "train").f1_score(labels, found, zero_division=0))


def macro_f1(labels: Numbers, found: Numbers) -> float:
    """The mean over the classes of each one's F1."""
    return float(require("sklearn.metrics", "train").f1_score(labels, found, average="macro", zero_division=0))


def matthews(labels: Numbers, found: Numbers) -> float:
    """Matthews' correlation: 1 for all right, 0 for chance or a constant answer."""
    return float(require("sklearn.metrics", "train").matthews_corrcoef(labels, found))


def pearson(labels: Numbers, found: Numbers) -> float:
    """Linear correlation; 0 where it is not defined, as for a constant answer."""
    return _correlation("pearsonr", labels, found)


def spearman(labels: Numbers, found: Numbers) -> float:
    """Correlation of the ranks; 0 where it is not defined, as for a constant answer."""
    return _correlation("spearmanr", labels, found)


def rmse(labels: Numbers, found: Numbers) -> float:
    """The root of the mean squared error, in the labels' unit."""
    return float(np.sqrt(np.mean((np.asarray(labels, float) - np.asarray(found, float)) ** 2)))


def _correlation(name: str, labels: Numbers, found: Numbers) -> float:
    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant answer
        value = float(getattr(require("scipy.stats", "train"), name)(labels, found).statistic)
    return value if math.isfinite(value) else 0.0


def span_f1(labels: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """F1 of whole spans of IOB tags, one list of tags a text: a span counts with its place, its end and its kind."""
    pairs = list(zip(labels, found, strict=True))
    right = sum(len(spans(a) & spans(b)) for a, b in pairs)
    total = sum(len(spans(a)) + len(spans(b)) for a, b in pairs)
    return 2 * right / total if total else 0.0


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first, last + 1, kind) of each span: B- begins one, and so does I- where no span of its kind goes on."""
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        begins, _, name = tag.partition("-")
        if kind and not (begins == "I" and name == kind):
            found.add((start, place, kind))
            kind = ""
        if begins in ("B", "I") and name and not kind:
            start, kind = place, name
    return found
