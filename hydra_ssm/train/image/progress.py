"""What an image run shows while it trains."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .evaluation import Score


class Shown:
    """Steps, loss, learning rate, pictures per second and time left; a line for each evaluation.

    Where the output is no terminal, a line every tenth of the run instead of a bar. `quiet`: nothing at all.
    """

    def __init__(self, steps: int, done: int, quiet: bool) -> None:
        self.console = Console(quiet=quiet)
        self.steps, self.said = steps, 10 * done // steps - 1 if done else -1
        self.bar = Progress(
            BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), TextColumn("left"), console=self.console,
            disable=quiet or not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=steps, completed=done, numbers="")

    def __enter__(self) -> Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()  # leave the terminal as it was, also after an error

    def step(self, done: int) -> None:
        """A step more."""
        self.bar.update(self.task, completed=done)

    def numbers(self, done: int, loss: float, rate: float, speed: float) -> None:
        """What a step measured."""
        text = f"loss {loss:.3f}  rate {rate:.2g}  {speed:,.0f} pictures/s"
        self.bar.update(self.task, numbers=text)
        tenth = 10 * done // self.steps
        if self.bar.disable and tenth > self.said:
            self.said = tenth
            self.say(f"step {done}/{self.steps}: {text}")

    def evaluated(self, epoch: int, epochs: int, raw: Score, averaged: Score) -> None:
        """A line for an epoch."""
        self.say(
            f"epoch {epoch}/{epochs}: held-out top-1 {averaged.top1:.1%} averaged, {raw.top1:.1%} raw; "
            f"top-5 {averaged.top5:.1%}"
        )

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)
