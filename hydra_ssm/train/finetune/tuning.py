"""A model that learns a user's rows: their labels as its outputs, training, scores, and the folder that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...text.collators import IGNORED
from ...text.messages import quiet
from ..checkpoints import remove
from ..errors import UserError
from ..workers import Say
from . import metrics
from .data import Examples
from .engine import Encoded, FineTuner, NotFinite, Recipe, load_model, load_words, longest, make_trainer, predict
from .table import Problem, Rows


@dataclass(frozen=True)
class Labels:
    """What the outputs of the model stand for: classes by name, or a number in units of the spread around the mean."""

    classes: tuple[str, ...] = ()
    middle: float = 0.0
    spread: float = 1.0

    def config(self) -> dict[str, Any]:
        """Of the model."""
        if not self.classes:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.classes))
        ids = {name: i for i, name in names.items()}
        return {"num_labels": len(names), "id2label": names, "label2id": ids}


class Tuning:
    """A model, and how rows become its tokens and outputs."""

    def __init__(self, model: str | Path, problem: Problem, labels: Labels, recipe: Recipe) -> None:
        self.problem, self.labels, self.recipe = problem, labels, recipe
        self.tokenizer: PreTrainedTokenizerBase = load_words(model)
        head = "token" if problem.task == "tagging" else "sequence"
        changes = labels.config()
        if problem.task == "classification":
            changes["problem_type"] = "single_label_classification"
        self.net: PreTrainedModel = load_model(model, head, recipe.seed, **changes)
        self.length = longest(self.net, recipe.length)

    def run(self, rows: Rows, kept: Rows, folder: Path, say: Say) -> dict[str, Any]:
        """Train, score, save: metrics of the held-out rows, and of an answer that knows no text."""
        work = folder / "work"
        encoded = self.encode(rows)
        if encoded.cut:
            way = ": --length takes more" if self.length == self.recipe.length else ", the most that the model reads"
            say(f"{encoded.cut:,} of {len(rows):,} rows to train on are cut at {self.length:,} tokens{way}")
        trainer = make_trainer(self.net, self.tokenizer, encoded, self.recipe, work, [Talk(say)])
        try:
            with quiet():
                trainer.fit()
                found, baseline, what = self.score(trainer, rows, kept)
        except NotFinite as error:
            rate = self.recipe.learning_rate
            raise UserError(f"the training has diverged {error}: choose a --learning-rate below {rate:g}") from None
        self._fold()
        with quiet():
            self.net.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        remove(work)
        return {"metrics": found, "baseline": baseline, "baseline_is": what, "steps": trainer.state.global_step}

    def encode(self, rows: Rows) -> Encoded:
        """Labels as the model learns them."""
        if self.problem.task == "tagging":
            return Tagged(self.tokenizer, rows, self.labels.classes, self.length)
        labels = [self._label(label) for label in rows.labels]
        first, *second = (list(column) for column in zip(*rows.texts, strict=True))
        return Encoded(self.tokenizer, Examples(first, second[0] if second else None, labels), self.length)

    def _label(self, label: Any) -> Any:
        if self.problem.task == "regression":
            return (label - self.labels.middle) / self.labels.spread
        return self.labels.classes.index(label)

    def score(self, trainer: FineTuner, rows: Rows, kept: Rows) -> tuple[dict[str, float], dict[str, float], str]:
        """(metrics, those of the answer that knows no text, what that answer is)."""
        encoded = self.encode(kept)
        outputs = predict(trainer, encoded)
        if self.problem.task == "tagging":
            return self._score_tags(encoded, outputs, rows)
        if self.problem.task == "regression":
            labels = np.array(kept.labels)
            found = outputs.reshape(-1) * self.labels.spread + self.labels.middle
            values = {name: getattr(metrics, name)(labels, found) for name in ("pearson", "spearman", "rmse")}
            return values, {"rmse": metrics.rmse(labels, np.full(len(labels), self.labels.middle))}, "the mean"
        numbers, usual = np.array(encoded.labels), Counter(rows.labels).most_common(1)[0][0]
        constant = np.full(len(numbers), self.labels.classes.index(usual))
        answers: dict[str, NDArray[Any]] = {"found": outputs.argmax(-1), "constant": constant}
        both = {
            who: {"accuracy": metrics.accuracy(numbers, given), "macro_f1": metrics.macro_f1(numbers, given)}
            for who, given in answers.items()
        }
        return both["found"], both["constant"], f"always {usual}"

    def _score_tags(
        self, encoded: Encoded, outputs: NDArray[Any], rows: Rows
    ) -> tuple[dict[str, float], dict[str, float], str]:
        """Of each word's first token; words that were cut off are not scored."""
        assert encoded.labels is not None
        names, usual = self.labels.classes, Counter(tag for tags in rows.labels for tag in tags).most_common(1)[0][0]
        right, found = [], []
        for labels, scores in zip(encoded.labels, outputs, strict=True):
            places = np.flatnonzero(labels != IGNORED)
            right.append([names[labels[i]] for i in places])
            found.append([names[scores[i].argmax()] for i in places])
        flat, given = (np.array([names.index(tag) for tags in part for tag in tags]) for part in (right, found))
        values = {"accuracy": metrics.accuracy(flat, given)}
        if any(name.startswith(("B-", "I-")) for name in names):
            values["span_f1"] = metrics.span_f1(right, found)
        return values, {"accuracy": float(np.mean(flat == names.index(usual)))}, f"always {usual}"

    @torch.no_grad()
    def _fold(self) -> None:
        """The saved model answers in the labels' own unit."""
        if self.problem.task != "regression":
            return
        last: Any = [m for m in self.net.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
        last.weight *= self.labels.spread
        last.bias *= self.labels.spread
        last.bias += self.labels.middle


class Tagged(Encoded):
    """Texts as lists of words; the first token of each word carries its tag, the others none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, classes: Sequence[str], length: int) -> None:
        self.labels, self.ids, self.types = [], [], []
        numbers = {name: i for i, name in enumerate(classes)}
        for (words,), tags in zip(rows.texts, rows.labels, strict=True):
            found = tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=length, return_token_type_ids=True
            )
            self._count_cut(found)
            places = found.word_ids()
            firsts = [place is not None and place != before for before, place in pairwise([None, *places])]
            labels = [numbers[tags[p]] if new else IGNORED for p, new in zip(places, firsts, strict=True)]
            self.ids.append(np.array(found["input_ids"], np.int32))
            self.types.append(np.array(found["token_type_ids"], np.int8))
            self.labels.append(np.array(labels))


class Talk(TrainerCallback):
    """A line every tenth of the run."""

    def __init__(self, say: Say) -> None:
        self.say, self.began, self.tenth = say, time.monotonic(), 0

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        tenth = 10 * state.global_step // state.max_steps
        if "loss" in given["logs"] and tenth > self.tenth:
            self.tenth = tenth
            left = (time.monotonic() - self.began) * (state.max_steps / state.global_step - 1)
            loss = f"loss {given['logs']['loss']:.3f}"
            self.say(f"step {state.global_step:,} of {state.max_steps:,}: {loss}, {left:.0f} s left")
