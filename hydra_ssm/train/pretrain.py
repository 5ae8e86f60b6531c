"""Pretraining of a masked language model, from text to a folder that transformers loads."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, set_seed
from transformers.integrations import TensorBoardCallback

from ..text import HydraForMaskedLM
from ..text.messages import quiet
from .baseline import Score
from .checkpoints import newest_whole, remove_unfinished
from .errors import Stopped, UserError
from .folder import RunFolder
from .prepare import Prepared, prepare
from .progress import ProgressBar, StopOnSignal
from .recipe import Recipe
from .report import write_report
from .trainer import EvaluateAtTheEnd, MaskedLMTrainer, arguments

DEFAULT_NAME = "Python's language reference (pydoc_data.topics)"
DEFAULT_EXAMPLE = "This method [MASK] called when the object is created."


def pretrain(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Score:
    """Train a masked language model and leave it in the folder `out`. Returns its held-out score.

    overwrite: a run that is there already is removed, once the new one has read its text.

    Raises:
        UserError: a mistake of the user's, training that diverges, or a full disk; what was saved before is intact.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    folder = RunFolder(out)
    folder.check_free(overwrite)
    console = Console()
    with console.status("reading the text"), quiet(), folder.begin(overwrite) as part:
        prepare(recipe, part)
    return Run(folder, console).train()


def resume(out: Path, given: Mapping[str, Any] | None = None) -> tuple[Recipe, Score | None]:
    """Go on with the run in `out` from its newest whole checkpoint: its recipe, and its score or None if it has ended.

    On a CPU the result is what it would have been without the interruption, to the last bit, given the same number of
    threads.

    Args:
        given: settings that the run must have, by name.

    Raises:
        UserError: there is no run, it has other settings, or its data has changed; or a full disk.
        Stopped: as in `pretrain`.
    """
    folder = RunFolder(out)
    recipe = folder.read_recipe()
    recorded = asdict(recipe)
    for name, value in (given or {}).items():
        if recorded[name] != value:
            raise UserError(f"{name} is {recorded[name]} in the run that goes on in {out}, got {value}")
    if folder.result():
        return recipe, None
    folder.check_prepared()
    return recipe, Run(folder, Console()).train()


class Run:
    """A prepared run: what is read from its folder, and the way to its result."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self.folder, self.console = folder, console
        self.recipe = folder.read_recipe()
        self.data = Prepared(self.recipe, folder.training)
        self.baseline = self.data.baseline

    def train(self) -> Score:
        """From the newest whole checkpoint, or the start, to the end."""
        for folder in (self.folder.path, self.folder.training, self.folder.checkpoints):
            remove_unfinished(folder)
        with quiet(), ProgressBar(self.console, self.baseline) as bar, StopOnSignal() as stop:
            checkpoint = newest_whole(self.folder.checkpoints)
            done = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
            logs = SummaryWriter(self.folder.tensorboard, purge_step=done + 1)  # what comes now takes their place
            trainer = self._trainer([bar, stop, TensorBoardCallback(logs)])
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            step = trainer.state.global_step
            if step < self.recipe.steps:
                assert stop.received is not None
                raise Stopped(step, self.recipe.steps, stop.received, self.folder.path)
        score = self._score(trainer.state.log_history)
        with quiet(), self.folder.finish() as part:
            trainer.net.save_pretrained(part)
            self.data.tokenizer.save_pretrained(part)
            write_report(part, self.recipe, self._facts(trainer, score), trainer.state.log_history)
        if not score.loss < self.baseline.loss:
            warnings.warn("the model knows no more than word frequencies: it needs more text or steps", stacklevel=2)
        return score

    def _score(self, history: list[dict[str, float]]) -> Score:
        """Of the evaluation after the last step."""
        last = next(entry for entry in reversed(history) if "eval_loss" in entry)
        return Score(last["eval_loss"], last["eval_masked_accuracy"], self.baseline.tokens)

    def _trainer(self, callbacks: list[TrainerCallback]) -> MaskedLMTrainer:
        set_seed(self.recipe.seed)
        return MaskedLMTrainer(
            HydraForMaskedLM(self.data.config),
            arguments(self.recipe, self.folder.checkpoints),
            self.data.training,
            self.data.evaluation,
            processing_class=self.data.tokenizer,
            callbacks=[*callbacks, EvaluateAtTheEnd()],
        )

    def _facts(self, trainer: MaskedLMTrainer, score: Score) -> dict[str, Any]:
        recipe, data = self.recipe, self.data
        tokens = len(data.train_rows.tokens)
        return {
            "data": ", ".join(recipe.sources) or DEFAULT_NAME,
            "model": score,
            "baseline": self.baseline,
            "model_perplexity": _perplexity(score),
            "baseline_perplexity": _perplexity(self.baseline),
            "training_tokens": tokens,
            "held_out_tokens": len(data.held_out_rows.tokens),
            "fill": tokens / (len(data.train_rows) * recipe.length),
            "passes": recipe.steps * recipe.batch_size / len(data.train_rows),
            "vocabulary": len(data.tokenizer),
            "parameters": trainer.net.num_parameters(),
            "example": example(recipe),
        }


def _perplexity(score: Score) -> float:
    return math.exp(min(score.loss, 700.0))  # JSON has no infinity


def example(recipe: Recipe) -> str:
    """A text with a [MASK] that the run's model may fill."""
    return "A sentence with one [MASK] in it." if recipe.sources else DEFAULT_EXAMPLE
