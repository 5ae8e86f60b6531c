"""One run of an ablation: a row, a seed, and the trainer that all have in common."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from ...bench.machine import device_name
from ...text import HydraForMaskedLM
from ...text.messages import quiet
from ..checkpoints import newest_whole, remove, remove_unfinished, whole_file
from ..errors import Diverged, UserError
from ..prepare import EVALUATION_RATE
from ..rows import EvaluationRows, TrainingRows
from ..trainer import EvaluateAtTheEnd, MaskedLMTrainer, arguments
from ..workers import Say, Stops, Until
from .data import Data, FullRowsCollator
from .models import config, form, has_state, heads, state
from .plan import Plan

DATA, RUNS = "data", "runs"  # folders of an ablation
TALK = 60.0  # seconds between what a long run says
FROM_GPU = {"dataloader_num_workers": 2, "per_device_eval_batch_size": 256}  # of TrainingArguments, where there is one

Record = dict[str, Any]


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
    remove_unfinished(folder)
    plan, data = Plan.read(out), Data(out / DATA)
    with quiet():
        trainer = _trainer(plan, data, key, folder, until, say)
        checkpoint = newest_whole(folder)
        found = {"row": key.row, "seed": key.seed, **_facts(plan, trainer, key), "at_once": at_once}
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Diverged as error:
            found |= {"diverged": f"by step {error.step}, {error.reason}"}
        else:
            if trainer.state.global_step < plan.steps:
                return None
            found |= _results(trainer, plan)
    with whole_file(key.file(out)) as part:
        part.write_text(json.dumps(found) + "\n", encoding="utf-8")
    remove(folder)
    return found


def steps_done(out: Path, key: Key) -> int:
    """Steps that a run under way has kept."""
    checkpoint = newest_whole(key.folder(out))
    return int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0


def _trainer(plan: Plan, data: Data, key: Key, folder: Path, until: Until, say: Say) -> MaskedLMTrainer:
    recipe = plan.recipe(key.seed)
    args = arguments(recipe, folder)
    args.save_strategy, args.max_grad_norm = SaveStrategy.NO, plan.clip
    if torch.cuda.is_available():
        for name, value in FROM_GPU.items():
            setattr(args, name, value)
    set_seed(key.seed)
    rows = TrainingRows(data.train, plan.steps * plan.batch_size, key.seed)
    return MaskedLMTrainer(
        HydraForMaskedLM(config(plan, key.row, len(data.tokenizer))),
        args,
        (rows, FullRowsCollator(data.tokenizer, plan.mask_rate)),
        (EvaluationRows(data.held_out), FullRowsCollator(data.tokenizer, EVALUATION_RATE)),
        processing_class=data.tokenizer,
        callbacks=[EvaluateAtTheEnd(), Stops(until, plan.save_after), Talk(key, say)],
    )


def _facts(plan: Plan, trainer: MaskedLMTrainer, key: Key) -> Record:
    matrix, computed = form(key.row)
    return {
        "matrix": matrix,
        "data_dependent": computed,
        "state": state(plan, key.row) if has_state(plan, key.row) else None,
        "heads": heads(plan, key.row),
        "parameters": trainer.net.num_parameters(),
        "device": device_name(trainer.args.device),
        "torch": torch.__version__,
    }


def _results(trainer: MaskedLMTrainer, plan: Plan) -> Record:
    """The curves, and where they end."""
    history = trainer.state.log_history
    training = [entry for entry in history if "masked_accuracy" in entry]
    held_out = [entry for entry in history if "eval_loss" in entry]
    tokens = plan.batch_size * plan.length
    return {
        "loss": held_out[-1]["eval_loss"], "accuracy": held_out[-1]["eval_masked_accuracy"],
        "seconds_a_step": tokens / median(entry["tokens_per_second"] for entry in training),
        "training": _curve(training, "loss", "masked_accuracy"),
        "held_out": _curve(held_out, "eval_loss", "eval_masked_accuracy"),
    }  # fmt: skip


def _curve(entries: list[dict[str, float]], loss: str, accuracy: str) -> dict[str, list[float]]:
    """By step, of six digits: there are many."""
    names = {"loss": loss, "accuracy": accuracy}
    curves = {name: [float(f"{entry[key]:.6g}") for entry in entries] for name, key in names.items()}
    return {"step": [entry["step"] for entry in entries], **curves}


class Talk(TrainerCallback):
    """A line of a long run now and then."""

    def __init__(self, key: Key, say: Say) -> None:
        self.key, self.say, self.said = key, say, time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        if time.monotonic() - self.said > TALK and state.global_step < state.max_steps:
            self.said = time.monotonic()
            loss = given["metrics"]["eval_loss"]
            self.say(f"{self.key}: step {state.global_step:,} of {state.max_steps:,}, held-out loss {loss:.3f}")
