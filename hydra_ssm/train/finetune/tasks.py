"""GLUE's eight tasks: what their files are called and hold, how they are scored, and the paper's recipe for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from . import metrics
from .metrics import Numbers

MNLI = "MNLI"
NLI = ("entailment", "neutral", "contradiction")
TWO = ("entailment", "not_entailment")
METRICS: Mapping[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": metrics.accuracy,
    "f1": metrics.f1,
    "matthews": metrics.matthews,
    "pearson": metrics.pearson,
    "spearman": metrics.spearman,
}
PAIR = (("sentence1", "question1", "premise", "#1 String"), ("sentence2", "question2", "hypothesis", "#2 String"))
SINGLE = (("sentence",),)
LABELS = ("label", "gold_label", "is_duplicate", "Quality", "score")  # names of their columns
INDEX = ("index", "id", "idx")


@dataclass(frozen=True)
class Task:
    """One task, and how the paper fine-tunes on it.

    Args:
        name: as GLUE's folders and submissions write it.
        hub: the configuration of Hugging Face's data set.
        texts: for the one or two texts of an example, the names that their columns have.
        classes: in the order of their numbers; none where labels are numbers from 0 to 5.
        words: what the files have for the classes.
        metrics: all that are reported.
        score: those whose mean is the task's place in the paper's table.
        weight_decay: decoupled: what a step at the highest learning rate takes off, as in the paper's pretraining.
        after_mnli: whether it starts from the model fine-tuned on MNLI.
    """

    name: str
    hub: str
    texts: tuple[tuple[str, ...], ...]
    classes: tuple[str, ...]
    words: tuple[str, ...]
    metrics: tuple[str, ...]
    score: tuple[str, ...]
    learning_rate: float
    weight_decay: float
    epochs: float
    batch_size: int = 16
    after_mnli: bool = False

    @property
    def dev(self) -> dict[str, tuple[str, ...]]:
        """By what ends the metrics' names, the files that may hold the part that is scored."""
        if self.name == MNLI:
            return {"_m": ("dev_matched.tsv", "dev.tsv"), "_mm": ("dev_mismatched.tsv",)}
        return {"": ("dev.tsv",)}

    @property
    def test(self) -> dict[str, str]:
        """By the name of the submission, the file without labels."""
        if self.name == MNLI:
            return {"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"}
        return {self.name: "test.tsv"}

    def scores(self, labels: Numbers, outputs: Numbers) -> dict[str, float]:
        """All metrics, of labels (n,) and a model's outputs (n, classes), or (n, 1) where labels are numbers."""
        found: Numbers = outputs.argmax(-1) if self.classes else outputs.reshape(len(labels))
        return {name: METRICS[name](labels, found) for name in self.metrics}

    def answers(self, outputs: Numbers) -> list[str]:
        """What a submission has for a model's outputs: words, or numbers from 0 to 5."""
        if self.classes:
            return [self.words[i] for i in outputs.argmax(-1)]
        return [f"{value:.3f}" for value in np.clip(np.asarray(outputs, float).reshape(-1), 0, 5)]


_YES_NO = ("0", "1")
TASKS = {
    task.name: task
    for task in (
        Task(MNLI, "mnli", PAIR, NLI, NLI, ("accuracy",), ("accuracy",), 1e-4, 5e-6, 2, 32),
        Task("QNLI", "qnli", (("question",), ("sentence",)), TWO, TWO, ("accuracy",), ("accuracy",), 5e-5, 1e-6, 7),
        Task(
            "QQP", "qqp", PAIR, ("not_duplicate", "duplicate"), _YES_NO, ("accuracy", "f1"), ("accuracy", "f1"),
            5e-5, 3e-6, 3,
        ),
        Task("RTE", "rte", PAIR, TWO, TWO, ("accuracy",), ("accuracy",), 1e-5, 1e-6, 3, after_mnli=True),
        Task(
            "SST-2", "sst2", SINGLE, ("negative", "positive"), _YES_NO, ("accuracy",), ("accuracy",), 5e-5, 3e-6, 2,
        ),
        Task(
            "MRPC", "mrpc", PAIR, ("not_equivalent", "equivalent"), _YES_NO, ("accuracy", "f1"), ("accuracy", "f1"),
            8e-5, 8e-6, 10, 32, after_mnli=True,
        ),
        Task(
            "CoLA", "cola", SINGLE, ("unacceptable", "acceptable"), _YES_NO, ("matthews", "accuracy"), ("matthews",),
            1e-4, 5e-6, 10, 32,
        ),
        Task("STS-B", "stsb", PAIR, (), (), ("pearson", "spearman"), ("spearman",), 3e-5, 3e-6, 10, after_mnli=True),
    )
}  # fmt: skip
PAPER = {  # Table 4, in the order of TASKS, and the average
    "paper: BERT 110M": (84.4, 90.3, 89.7, 77.1, 92.3, 90.7, 54.2, 89.1, 83.5),
    "paper: Hydra 112M": (84.5, 90.0, 91.3, 77.5, 93.5, 91.2, 57.2, 88.9, 84.3),
}


def plain(name: str) -> str:
    """A task's or folder's name, however it is spelled: SST-2, sst2, STSB, ..."""
    return name.lower().replace("-", "").replace("_", "")


def choose(names: tuple[str, ...] | list[str]) -> list[str]:
    """The tasks that go by these names, in the paper's order; all for none or "all". Raises ValueError."""
    known = {plain(name): name for name in TASKS}
    wanted = {plain(name) for name in names} or {"all"}
    if unknown := sorted(wanted - known.keys() - {"all"}):
        raise ValueError(f"tasks must be of {', '.join(TASKS)}, or all, got {', '.join(unknown)}")
    return [name for key, name in known.items() if key in wanted or "all" in wanted]
