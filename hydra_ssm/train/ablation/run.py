"""One run of an ablation: a row, a seed, and the trainer that all have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from ...text import HydraForMaskedLM
from ...text.collators import MaskedLMCollator
from ...text.messages import quiet
from ..batches import Batches
from ..checkpoints import newest_whole, remove
from ..errors import UserError
from ..loop import Course, NotFinite, Training, free_memory
from ..plans import read_plan
from ..prepare import EVALUATION_RATE
from ..records import Record, write_json
from ..rows import EvaluationRows
from ..trainee import How
from ..workers import Say, Until
from .data import Data, FullRowsCollator
from .models import config, form, has_state, heads, state
from .plan import EVALUATIONS, Plan

DATA, RUNS = "data", "runs"  # folders of an ablation
TALK = 60.0  # seconds between what a long run says
ON_THE_WAY = 512  # held-out rows of an evaluation before the end
HELD_OUT = "held-out"
HOW = How(compile=False)  # so many classes would take longer to compile than to train


class Key(NamedTuple):
    """What tells the runs of an ablation apart."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Of the checkpoints, while it is under way."""
        return out / RUNS / f"{self.row}-seed-{self.seed}"

    def file(self, out: Path) -> Path:
        """Of the record, once it is finished."""
        return self.folder(out).with_suffix(".json")


def finished(out: Path, key: Key) -> Record | None:
    """The record of a run that has come to its end."""
    return read(key.file(out)) if key.file(out).exists() else None


def read(file: Path) -> Record:
    """The record in a file. Raises UserError where there is something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if file.name == Key(found["row"], found["seed"]).file(file.parent).name:
            return found
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{file} must be the record of a run, it is something else or damaged: remove it") from None


def train(out: Path, key: Key, until: Until, at_once: int, say: Say) -> Record | None:
    """Go on with a run to its end, and keep its record in a file of its own. None where it had to stop before.

    Raises UserError where the disk is full.
    """
    if until.over() or (found := finished(out, key)):
        return finished(out, key)
    folder = key.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    plan, data = read_plan(Plan, out), Data(out / DATA)
    free_memory(compiled=False)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # for a few small kernels many would take longer
    with quiet():
        training = _training(plan, data, key, folder, say, at_once)
        found = {"row": key.row, "seed": key.seed, **_facts(plan, key, training)}
        try:
            if not training.fit(until):
                return None
            score = training.trainee.score(*evaluation(data, len(data.held_out)), plan.batch_size * plan.length)
            found |= {"loss": score.loss, "accuracy": score.accuracy, **_curves(training)}
        except NotFinite as error:
            found |= {"diverged": str(error)}
        found |= {
            "device": ", then ".join(training.devices), "at_once": training.at_once, "graph": training.graph
        }  # fmt: skip
    write_json(key.file(out), found)
    remove(folder)
    return found


def steps_done(out: Path, key: Key) -> int:
    """Steps that a run under way has kept."""
    checkpoint = newest_whole(key.folder(out))
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def evaluation(data: Data, most: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels), (rows, length) each: of all held-out text alike, in every run the same tokens hidden."""
    rows, collator = EvaluationRows(data.held_out), FullRowsCollator(data.tokenizer, EVALUATION_RATE)
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    found = collator([rows[int(i)] for i in chosen])
    return found["input_ids"], found["labels"]


def _training(plan: Plan, data: Data, key: Key, folder: Path, say: Say, at_once: int = 1) -> Training:
    recipe = plan.recipe(key.seed)
    course = Course(
        str(key), plan.steps, plan.learning_rate, recipe.weight_decay, plan.clip, key.seed, evaluations=EVALUATIONS,
        evaluate_first=False, batch_tokens=plan.batch_size * plan.length, save_after=plan.save_after, talk_after=TALK,
    )  # fmt: skip
    batches = Batches(
        data.train, MaskedLMCollator(data.tokenizer, plan.mask_rate), plan.batch_size, key.seed, plan.accumulate
    )
    set_seed(key.seed)
    net = HydraForMaskedLM(config(plan, key.row, len(data.tokenizer)))
    return Training(course, batches, {HELD_OUT: evaluation(data, ON_THE_WAY)}, net, folder, HOW, say, at_once)


def _facts(plan: Plan, key: Key, training: Training) -> Record:
    matrix, computed = form(key.row)
    return {
        "matrix": matrix,
        "data_dependent": computed,
        "state": state(plan, key.row) if has_state(plan, key.row) else None,
        "heads": heads(plan, key.row),
        "parameters": training.trainee.net.num_parameters(),
        "torch": torch.__version__,
    }


def _curves(training: Training) -> Record:
    names = ("step", f"{HELD_OUT}_loss", f"{HELD_OUT}_accuracy")
    return {
        "seconds_a_step": median(training.paces),  # what holds up some of the steps does not show
        "training": _curve(training.training),
        "held_out": _curve([[point[name] for name in names] for point in training.curve]),
    }


def _curve(points: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Of (step, loss, accuracy), in six digits: there are many."""
    step, loss, accuracy = zip(*points, strict=True)
    short = {"loss": loss, "accuracy": accuracy}
    return {"step": [*step]} | {name: [float(f"{value:.6g}") for value in short[name]] for name in short}
