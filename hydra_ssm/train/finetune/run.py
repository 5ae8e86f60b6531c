"""One run of GLUE: a task and a seed, from a model's folder to a record, and its answers for the test set."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from ...bench.machine import device_name
from ...text.messages import quiet
from ..checkpoints import newest_whole, remove, remove_unfinished, whole_file, whole_folder
from ..errors import UserError
from ..plans import read_plan
from ..records import Record, read_json, write_json
from ..workers import Stops, Until
from .data import Examples, TaskData, find
from .engine import Encoded, FineTuner, NotFinite, Recipe, load_model, load_words, longest, make_trainer, predict
from .tasks import MNLI, TASKS, Task

RUNS, MODELS, PREDICTIONS = "runs", "models", "predictions"
SAVE_AFTER = 60.0  # seconds between checkpoints


@dataclass(frozen=True)
class Plan:
    """What all runs of a folder have in common. The settings that are None follow the paper's, task by task.

    Args:
        model: the folder of the model that is fine-tuned.
        weights: their SHA-256.
        data: a folder, or the name of a data set.
        direct: whether every task starts from the model, none from the one fine-tuned on MNLI.
    """

    model: str
    weights: str
    data: str
    direct: bool = False
    length: int = 256
    learning_rate: float | None = None
    epochs: float | None = None
    batch_size: int | None = None

    def recipe(self, task: Task, seed: int) -> Recipe:
        """The paper's, but for what is set here."""
        rate = self.learning_rate or task.learning_rate
        return Recipe(
            rate, task.weight_decay, self.epochs or task.epochs, self.batch_size or task.batch_size, self.length, seed
        )


def weights_of(folder: Path) -> str:
    """The SHA-256 of a model's weights. Raises UserError where there are none."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"{folder} must hold a model, as pretrain or save_pretrained write it, it has no weights")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Key(NamedTuple):
    """What tells runs apart."""

    task: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Of the checkpoints, while it is under way."""
        return out / RUNS / f"{self.task}-seed-{self.seed}"

    def file(self, out: Path) -> Path:
        """Of the record, once it is finished."""
        return out / RUNS / f"{self.task}-seed-{self.seed}.json"

    def model(self, out: Path) -> Path:
        """Of what MNLI leaves for others to start from."""
        return out / MODELS / f"{self.task}-seed-{self.seed}"


def finished(out: Path, key: Key) -> Record | None:
    """The record of a run that has come to its end."""
    return read_json(key.file(out))


def train(out: Path, key: Key, until: Until) -> Record | None:
    """Go on with a run to its end, and keep its record in a file of its own. None where it had to stop before.

    Raises UserError where the disk is full, or the data is no longer there.
    """
    if until.over() or finished(out, key):
        return finished(out, key)
    plan, task = read_plan(Plan, out), TASKS[key.task]
    data = find(plan.data, task)
    if isinstance(data, str):
        raise UserError(data)
    folder = key.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    record: Record = {"task": task.name, "seed": key.seed}
    try:
        run = Run(plan, task, key, _start(out, plan, task, key.seed), data)
        trainer = run.trainer(folder, until)
        record, began = run.facts(trainer), time.perf_counter()
        with quiet():
            trainer.fit(newest_whole(folder))
            if trainer.state.global_step < trainer.state.max_steps:
                return None
            record |= run.results(trainer) | {"seconds": round(time.perf_counter() - began, 1)}
            _keep(out, key, run, trainer)
    except NotFinite as error:
        record["diverged"] = str(error)
    write_json(key.file(out), record)
    remove(folder)
    return record


def _start(out: Path, plan: Plan, task: Task, seed: int) -> Path:
    """The folder that the run's weights come from. Raises NotFinite where the run that should have left it diverged."""
    first = Key(MNLI, seed)
    record = finished(out, first)
    if record is None or plan.direct or not task.after_mnli:
        return Path(plan.model)
    if "diverged" in record:
        raise NotFinite("with MNLI, from which it starts")
    if not first.model(out).is_dir():
        raise UserError(f"{first.model(out)} is missing: remove {first.file(out)} to train it again")
    return first.model(out)


class Run:
    """A task's data as a model's tokens, and the way to its scores."""

    def __init__(self, plan: Plan, task: Task, key: Key, start: Path, data: TaskData) -> None:
        self.plan, self.task, self.key, self.start, self.data = plan, task, key, start, data
        self.recipe = plan.recipe(task, key.seed)
        self.tokenizer = load_words(plan.model)
        self.model: PreTrainedModel = load_model(start, "sequence", key.seed, **self._head())
        self.length = longest(self.model, self.recipe.length)
        self.train = Encoded(self.tokenizer, data.train(), self.length)

    def _head(self) -> dict[str, Any]:
        if not self.task.classes:
            return {"num_labels": 1, "problem_type": "regression"}
        names = dict(enumerate(self.task.classes))
        return {
            "num_labels": len(names), "problem_type": "single_label_classification",
            "id2label": names, "label2id": {name: i for i, name in names.items()},
        }  # fmt: skip

    def trainer(self, folder: Path, until: Until) -> FineTuner:
        return make_trainer(self.model, self.tokenizer, self.train, self.recipe, folder, [Stops(until, SAVE_AFTER)])

    def facts(self, trainer: FineTuner) -> Record:
        return {
            "task": self.task.name, "seed": self.key.seed,
            "start": MNLI if self.start != Path(self.plan.model) else "model",
            "recipe": asdict(self.recipe) | {"length": self.length}, "train_rows": len(self.train),
            "device": device_name(trainer.args.device), "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip

    def results(self, trainer: FineTuner) -> Record:
        """The scores on the part for development, and their mean, which is the task's."""
        scores: dict[str, float] = {}
        rows: dict[str, int] = {}
        for ending, read in self.data.dev.items():
            examples = read()
            found = self.outputs(trainer, examples)
            rows[f"dev{ending}"] = len(examples)
            named = self.task.scores(np.array(examples.labels), found)
            scores |= {f"{name}{ending}": value for name, value in named.items()}
        counted = [value for name, value in scores.items() if name.partition("_")[0] in self.task.score]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "score": sum(counted) / len(counted), "scores": scores, "rows": rows,
            "steps": trainer.state.global_step, "last_loss": losses[-1] if losses else None,
        }  # fmt: skip

    def outputs(self, trainer: FineTuner, examples: Examples) -> Any:
        """(examples, outputs)."""
        return predict(trainer, Encoded(self.tokenizer, examples, self.length))


def _keep(out: Path, key: Key, run: Run, trainer: FineTuner) -> None:
    """The answers for the test set, and of MNLI the model."""
    for name, read in run.data.test.items():
        examples = read()
        answers = run.task.answers(run.outputs(trainer, examples))
        path = out / PREDICTIONS / f"seed-{key.seed}" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            lines = ["index\tprediction", *map("\t".join, zip(examples.index, answers, strict=True))]
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if key.task == MNLI and not run.plan.direct:
        with whole_folder(key.model(out)) as part:
            run.model.save_pretrained(part)
            run.tokenizer.save_pretrained(part)
