"""What a run shows while it trains, and how it stops when it is asked to."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .baseline import Score
from .distributed import Team


class ProgressBar(TrainerCallback):
    """Steps, loss, masked accuracy, tokens per second, utilisation and time left; a line for each evaluation.

    Where the output is no terminal, a line every tenth of the run instead of a bar.
    """

    def __init__(self, console: Console, baseline: Score) -> None:
        self.console, self.baseline, self.said = console, baseline, -1
        self.bar = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()  # leave the terminal as it was, also after an error

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()
        self.first, self.began = state.global_step, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if "eval_loss" in logs:
            self.console.print(
                f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f} (word frequencies alone "
                f"{self.baseline.loss:.3f}), masked accuracy {logs['eval_masked_accuracy']:.1%} "
                f"({self.baseline.accuracy:.1%})",
                soft_wrap=True,
            )
        if "masked_accuracy" not in logs:
            return
        numbers = (
            f"loss {logs['loss']:.3f}  masked acc. {logs['masked_accuracy']:.1%}  "
            f"{logs['tokens_per_second']:,.0f} tokens/s"
        )  # with the rest of the bar, 80 columns
        if "model_flop_utilisation" in logs:
            numbers += f"  MFU {logs['model_flop_utilisation']:.1%}"
        self.bar.update(self.task, numbers=numbers)
        tenth = 10 * state.global_step // state.max_steps
        if self.bar.disable and tenth > self.said:
            self.said = tenth
            self.console.print(
                f"step {state.global_step}/{state.max_steps}: {numbers}{self._left(state)}", soft_wrap=True
            )

    def _left(self, state: TrainerState) -> str:
        """The time that the remaining steps take, at the pace of this attempt."""
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        if not done or not left:
            return ""
        seconds = (time.monotonic() - self.began) / done * left
        return f"  {timedelta(seconds=round(seconds))} left"


class StopOnSignal(TrainerCallback):
    """The first SIGINT or SIGTERM saves a checkpoint after the current step and stops; the second does what it did.

    An evaluation ends at its next batch, by `agreed`.

    One that comes to any process of a team stops all of them after the same step. There a second signal does nothing:
    launchers pass on what a terminal or a scheduler sends to all, and kill processes that do not end in time.
    """

    received: int | None = None

    def __init__(self, team: Team = Team()) -> None:  # noqa: B008 - a value
        self.team = team

    def __enter__(self) -> StopOnSignal:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.received and self.team.size > 1 else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.team.size == 1:
            self.__exit__()

    def agreed(self) -> bool:
        """Whether a signal has come to any process. All of them ask together."""
        self.received = self.team.most(self.received or 0) or None
        return self.received is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed():
            control.should_save = control.should_training_stop = True
