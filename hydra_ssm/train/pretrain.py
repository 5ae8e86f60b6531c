"""Pretraining of a masked language model, from text to a folder that transformers loads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, set_seed

from ..text import HydraConfig
from ..text.config import differences
from ..text.messages import quiet
from .baseline import Score
from .checkpoints import newest_whole, remove_unfinished
from .distributed import Team
from .errors import Stopped, UserError
from .folder import RunFolder
from .prepare import Prepared, prepare
from .progress import ProgressBar, StopOnSignal
from .recipe import Recipe
from .report import perplexity, write_report
from .reporters import check_installed, reporting
from .trainer import EvaluateAtTheEnd, EvaluationInterrupted, GivenIntervals, MaskedLMTrainer, arguments, evaluated

DEFAULT_NAME = "Python's language reference (pydoc_data.topics)"
DEFAULT_EXAMPLE = "This method [MASK] called when the object is created."


def pretrain(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Score:
    """Train a masked language model and leave it in the folder `out`. Returns its held-out score.

    Under torchrun or accelerate launch, all processes call it and train together; the first one writes and speaks.

    overwrite: a run that is there already is removed, once the new one has read its text.

    Raises:
        UserError: a mistake of the user's, training that diverges, or a full disk; what was saved before is intact.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    team, folder = Team.join(), RunFolder(out)

    def begin() -> None:
        check_installed(recipe.report_to)
        if recipe.model is not None and Path(recipe.model).expanduser().resolve() == out.resolve():
            raise UserError(f"{out} holds the model that the run begins with: choose another --out")
        folder.check_free(overwrite)
        with Console().status("reading the text"), quiet(), folder.begin(overwrite) as part:
            prepare(recipe, part)

    with team.talking():
        team.first_does(begin)
        score = Run(folder, _console(team), team).train()
    team.leave()
    return score


def resume(out: Path, given: Mapping[str, Any] | None = None) -> tuple[Recipe, Score | None]:
    """Go on with the run in `out` from its newest whole checkpoint: its recipe, and its score or None if it has ended.

    On a CPU the result is what it would have been without the interruption, to the last bit, given the same number of
    threads and of processes; with another number of processes it differs by the rounding of sums.

    Args:
        given: settings that the run must have, by name; those that say how a run is computed may be other ones.

    Raises:
        UserError: there is no run, it has other settings, or its data has changed; or a full disk.
        Stopped: as in `pretrain`.
    """
    team, folder = Team.join(), RunFolder(out)

    def begin() -> tuple[Recipe, bool]:
        recipe = folder.read_recipe().going_on(given or {}, out)
        check_installed(recipe.report_to)
        ended = bool(folder.result())
        if not ended:
            folder.check_prepared()
        return recipe, ended

    with team.talking():
        recipe, ended = team.first_does(begin)
        score = None if ended else Run(folder, _console(team), team, recipe).train()
    team.leave()
    return recipe, score


def _console(team: Team) -> Console:
    return Console() if team.first else Console(quiet=True)


class Run:
    """A prepared run: what is read from its folder, and the way to its result.

    recipe: how it goes on, where that is not as it began.
    """

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        team: Team = Team(),  # noqa: B008 - a value
        recipe: Recipe | None = None,
    ) -> None:
        self.folder, self.console, self.team = folder, console, team
        self.recipe = team.each_does(lambda: recipe or self._read_recipe())
        baseline = team.first_does(lambda: Prepared(self.recipe, folder.training).baseline)
        self.data = team.each_does(lambda: Prepared(self.recipe, folder.training, baseline))
        self.baseline = baseline

    def _read_recipe(self) -> Recipe:
        if not self.folder.exists():
            raise UserError(f"{self.folder.path} must be on a disk that all machines see, it is not here")
        return self.folder.read_recipe()

    def train(self) -> Score:
        """From the newest whole checkpoint, or the start, to the end."""
        with (
            quiet(),
            ProgressBar(self.console, self.baseline) as bar,
            StopOnSignal(self.team) as stop,
            reporting(self.recipe.report_to if self.team.first else (), self.folder, self.recipe) as report,
        ):
            checkpoint = self.team.first_does(self._newest)
            trainer = self._trainer([*([bar] if self.team.first else []), stop, *report(checkpoint)])
            with suppress(EvaluationInterrupted):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            step = trainer.state.global_step
            if step < self.recipe.steps or not evaluated(trainer.state):
                assert stop.received is not None
                raise Stopped(step, self.recipe.steps, stop.received, self.folder.path)
        score = self._scores(trainer.state.log_history)[-1]
        weights = trainer.whole_model()
        self.team.first_does(lambda: self._finish(trainer, weights, score))
        if not score.loss < self.baseline.loss:
            warnings.warn("the model knows no more than word frequencies: it needs more text or steps", stacklevel=2)
        return score

    def _newest(self) -> Path | None:
        for folder in (self.folder.path, self.folder.training, self.folder.checkpoints):
            remove_unfinished(folder)
        found = newest_whole(self.folder.checkpoints)
        if found is not None:
            self._check_own(found)
        return found

    def _check_own(self, checkpoint: Path) -> None:
        """Raises UserError where it is of a model of other sizes, as one that was copied here may be."""
        other, own = HydraConfig.from_pretrained(checkpoint), self.data.config
        for name in differences(own, other) or ["vocab_size"]:
            if (given := getattr(other, name)) != (wanted := getattr(own, name)):
                raise UserError(
                    f"{checkpoint} must be of this run's model, its {name} is {given} in place of {wanted}: remove it"
                )

    def _finish(self, trainer: MaskedLMTrainer, weights: dict[str, Tensor] | None, score: Score) -> None:
        with quiet(), self.folder.finish() as part:
            trainer.net.save_pretrained(part, state_dict=weights)
            self.data.tokenizer.save_pretrained(part)
            write_report(part, self.recipe, self._facts(trainer, score), trainer.state.log_history)

    def _scores(self, history: list[dict[str, float]]) -> list[Score]:
        """Of all evaluations, the last one after the last step."""
        found = [entry for entry in history if "eval_loss" in entry]
        return [Score(e["eval_loss"], e["eval_masked_accuracy"], self.baseline.tokens) for e in found]

    def _trainer(self, callbacks: list[TrainerCallback]) -> MaskedLMTrainer:
        set_seed(self.recipe.seed)
        return MaskedLMTrainer(
            self.data.model(),
            arguments(self.recipe, self.folder.checkpoints),
            self.data.training,
            self.data.evaluation,
            team=self.team,
            recipe=self.recipe,
            asked=next((c.agreed for c in callbacks if isinstance(c, StopOnSignal)), lambda: False),
            processing_class=self.data.tokenizer,
            callbacks=[*callbacks, GivenIntervals(evaluate_first=self.recipe.model is not None), EvaluateAtTheEnd()],
        )

    def _facts(self, trainer: MaskedLMTrainer, score: Score) -> dict[str, Any]:
        recipe, data = self.recipe, self.data
        tokens = len(data.train_rows.tokens)
        return {
            "data": ", ".join(recipe.sources) or DEFAULT_NAME,
            "model": score,
            **({"start": self._scores(trainer.state.log_history)[0]} if recipe.model is not None else {}),
            "baseline": self.baseline,
            "model_perplexity": perplexity(score),
            "baseline_perplexity": perplexity(self.baseline),
            "training_tokens": tokens,
            "held_out_tokens": len(data.held_out_rows.tokens),
            "held_out_rows": len(data.held_out_rows),
            "evaluation_rows": len(data.evaluation[0]),
            "fill": tokens / (len(data.train_rows) * recipe.length),
            "passes": recipe.steps * recipe.batch_size / len(data.train_rows),
            "vocabulary": len(data.tokenizer),
            "parameters": trainer.net.num_parameters(),
            "processes": self.team.size,
            "example": example(recipe),
        }


def example(recipe: Recipe) -> str:
    """A text with a [MASK] that the run's model may fill."""
    return "A sentence with one [MASK] in it." if recipe.sources else DEFAULT_EXAMPLE
