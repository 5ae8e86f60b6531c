"""From a user's file to a model in a folder: what `hydra-ssm finetune` does."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from ..checkpoints import MANIFEST, UNFINISHED, remove, whole_folder
from ..errors import UserError
from ..workers import Say, speak
from . import metrics
from .engine import SHORTEST, Recipe
from .table import TASKS, Problem, Rows, as_number, guess, read_rows, take
from .tuning import Labels, Tuning

REPORT = "finetune.json"
SHARE = 0.1  # of the rows, held out
FEW = 10_000  # rows: with fewer, more epochs
USUAL: dict[str, Any] = {"learning_rate": 5e-5, "batch_size": 16, "length": 256, "seed": 0}


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
    if labels.classes and (new := sorted(_names(kept.labels) - _names(rows.labels), key=_natural)):
        say(f"of the held-out labels, no row to train on has {', '.join(new[:5])}{', ...' if len(new) > 5 else ''}")
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
    try:
        own = json.loads(earlier.read_text(encoding="utf-8"))["files"] if earlier.is_file() else []
    except (ValueError, LookupError, TypeError):
        own = []  # it is not known whose they are
    if foreign := [name for name in entries if name not in own and not name.startswith(UNFINISHED)]:
        raise UserError(f"{folder} must be new or empty, it holds {min(foreign)}: choose another --out")
    if own and not overwrite:
        raise UserError(f"{folder} holds a model already: choose another --out, or --overwrite to replace it")


def _recipe(settings: dict[str, Any], rows: int) -> Recipe:
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if name == "seed" and not 0 <= value < 2**32:
            raise UserError(f"seed must be at least 0 and below {2**32}, got {value}")
        if name == "length" and value < SHORTEST:
            raise UserError(f"length must be at least {SHORTEST}, got {value}")
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
    names = _names(every)
    if len(names) < 2:
        raise UserError(f"there must be two labels at least in {problem.label}, all rows have {min(names)}")
    if len(names) > 1000 or (problem.task == "classification" and len(names) > max(2, len(every) // 2)):
        raise UserError(
            f"{problem.label} has {len(names)} different labels in {len(every)} rows, too many to learn: name another "
            "column with --label, or --task regression for numbers"
        )
    return Labels(tuple(sorted(names, key=_natural)))


def _names(labels: Sequence[str | list[str]]) -> set[str]:
    """Of classes or tags."""
    return {name for label in labels for name in (label if isinstance(label, list) else [label])}


def _natural(name: str) -> tuple[float, str]:
    """Numbers in their order, before words in theirs."""
    number = as_number(name)
    return float("inf") if number is None else number, name


def _described(problem: Problem, rows: Rows, labels: Labels) -> str:
    if problem.task == "regression":
        return f"numbers from {min(rows.labels):g} to {max(rows.labels):g}"
    flat = [name for tags in rows.labels for name in tags] if problem.task == "tagging" else rows.labels
    counts = Counter(flat).most_common(5)
    more = ", ..." if len(labels.classes) > 5 else ""
    return f"{len(labels.classes)} labels ({', '.join(f'{name}: {count:,}' for name, count in counts)}{more})"
