"""From a user's file to a model in a folder: what `hydra-ssm finetune` does."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...text.collators import IGNORED
from ...text.messages import quiet
from ..ablation.run import Say, speak
from ..checkpoints import MANIFEST, UNFINISHED, remove, whole_folder
from ..errors import UserError
from . import metrics
from .data import Examples
from .engine import (
    Encoded,
    FineTuner,
    NotFinite,
    Recipe,
    load_model,
    load_words,
    longest,
    make_trainer,
    predict,
)
from .table import TASKS, Problem, Rows, guess, read_rows, take

REPORT = "finetune.json"
SHARE = 0.1  # of the rows, held out
FEW = 10_000  # rows: with fewer, more epochs
USUAL: dict[str, Any] = {"learning_rate": 5e-5, "batch_size": 16, "length": 256, "seed": 0}


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


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    task: str | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
    held_out: str | Path | None = None,
    overwrite: bool = False,
    say: Say = speak,
    **settings: Any,
) -> dict[str, Any]:
    """What `hydra-ssm finetune` does, for a machine where what parses its options is missing. Returns what JSON has.

    Args:
        model: a folder that pretrain, convert or save_pretrained wrote, with its tokenizer.
        data: a file of .csv, .tsv or .jsonl.
        out: a folder that is new or empty; None for runs/ and the name of the data.
        task: classification, regression or tagging; None to guess.
        text: the column of texts, or two of texts that belong together; none to guess.
        label: the column of labels; None to guess.
        held_out: a file to score the model on; None for a tenth of the rows, those with equal texts kept together.
        overwrite: replace what an earlier call left in `out`.
        settings: learning_rate, epochs, batch_size, length, seed.

    Raises:
        UserError: what the user can repair.
        ImportError: SciPy or scikit-learn is missing.
    """
    metrics.check_installed()
    folder = Path("runs") / Path(data).stem if out is None else Path(out)
    _check_free(folder, overwrite)
    if task not in (None, *TASKS):
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {task}")
    raw, remarks = read_rows(Path(data))
    problem = guess(raw, task, list(text), label)
    say(
        f"{problem}" + (" (guessed; --task, --text and --label say otherwise)" if not (task and text and label) else "")
    )
    rows = take(raw, problem, data)
    kept, more = _held_out(rows, problem, held_out, settings.get("seed") or 0)
    for remark in (*remarks, *rows.remarks, *more):
        say(remark)
    labels = _labels(problem, rows, kept)
    recipe = _recipe(settings, len(rows))
    say(f"{_described(problem, rows, labels)}; {len(rows):,} rows to train on, {len(kept):,} held out")
    report: dict[str, Any] = {
        "model": str(model), "data": str(data), "problem": asdict(problem), "classes": labels.classes,
        "rows": {"train": len(rows), "held_out": len(kept)}, "recipe": asdict(recipe),
    }  # fmt: skip
    tuning = Tuning(model, problem, labels, recipe)
    with whole_folder(folder) as part:
        found = tuning.run(rows, kept, part, say)
        report |= found
        report["files"] = sorted([*(path.name for path in part.iterdir()), REPORT])
        (part / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    remove(folder / MANIFEST)
    say(f"held out: {_told(found['metrics'])} ({_told(found['baseline'])} for {found['baseline_is']})")
    say(f"saved {folder}, for transformers' Auto classes and pipelines")
    return report


def _told(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, it is a file")
    entries = [p.name for p in folder.iterdir()] if folder.exists() else []
    earlier = folder / REPORT
    own = json.loads(earlier.read_text(encoding="utf-8"))["files"] if earlier.is_file() else []
    if foreign := [name for name in entries if name not in own and not name.startswith(UNFINISHED)]:
        raise UserError(f"{folder} must be new or empty, it holds {min(foreign)}: choose another --out")
    if own and not overwrite:
        raise UserError(f"{folder} holds a model already: choose another --out, or --overwrite to replace it")


def _recipe(settings: dict[str, Any], rows: int) -> Recipe:
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name == "seed" and not 0 <= value < 2**32:
            raise UserError(f"seed must be at least 0 and below {2**32}, got {value}")
        if name != "seed" and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, got {value}")
    return Recipe(**{"weight_decay": 0.0, "epochs": 10 if rows < FEW else 3, **USUAL, **given})


def _held_out(rows: Rows, problem: Problem, file: str | Path | None, seed: int) -> tuple[Rows, list[str]]:
    """Rows to score on, taken out of `rows` unless they come from a file of their own; and remarks."""
    if file is not None:
        raw, remarks = read_rows(Path(file))
        guess(raw, problem.task, problem.texts, problem.label)  # it has these columns
        kept = take(raw, problem, file)
        return kept, [*remarks, *kept.remarks]
    texts = sorted({json.dumps(text) for text in rows.texts})
    if len(texts) < 2:
        raise UserError(f"there must be two different texts at least, one of them to hold out, got {len(texts)}")
    random.Random(seed).shuffle(texts)
    chosen = set(texts[: max(1, round(SHARE * len(texts)))])
    kept, left = Rows(), Rows(remarks=rows.remarks)
    for text, label in zip(rows.texts, rows.labels, strict=True):
        part = kept if json.dumps(text) in chosen else left
        part.texts.append(text)
        part.labels.append(label)
    rows.texts, rows.labels = left.texts, left.labels
    return kept, []


def _labels(problem: Problem, rows: Rows, kept: Rows) -> Labels:
    """Raises UserError where there is nothing to tell apart."""
    if problem.task == "regression":
        if len(set(rows.labels)) < 2:
            raise UserError(f"the labels must differ, all are {rows.labels[0]:g}")
        return Labels(middle=mean(rows.labels), spread=pstdev(rows.labels))
    every = [*rows.labels, *kept.labels]
    names = {name for tags in every for name in tags} if problem.task == "tagging" else set(every)
    if len(names) < 2:
        raise UserError(f"there must be two labels at least in {problem.label}, all rows have {min(names)}")
    if len(names) > 1000 or (problem.task == "classification" and len(names) > max(2, len(every) // 2)):
        raise UserError(
            f"{problem.label} has {len(names)} different labels in {len(every)} rows, too many to learn: name another "
            "column with --label, or --task regression for numbers"
        )
    return Labels(tuple(sorted(names, key=_natural)))


def _natural(name: str) -> tuple[float, str]:
    """Numbers in their order, before words in theirs."""
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name


def _described(problem: Problem, rows: Rows, labels: Labels) -> str:
    if problem.task == "regression":
        return f"numbers from {min(rows.labels):g} to {max(rows.labels):g}"
    flat = [name for tags in rows.labels for name in tags] if problem.task == "tagging" else rows.labels
    counts = Counter(flat).most_common(5)
    more = ", ..." if len(labels.classes) > 5 else ""
    return f"{len(labels.classes)} labels ({', '.join(f'{name}: {count:,}' for name, count in counts)}{more})"


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
        trainer = make_trainer(self.net, self.tokenizer, self.encode(rows), self.recipe, work, [Talk(say)])
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
            places = found.word_ids()
            firsts = [place is not None and place not in places[:i] for i, place in enumerate(places)]
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
