"""The training loop of comparisons: many short runs of fixed shapes, each resumed as if nothing had happened."""

from __future__ import annotations

import gc
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bench.machine import device_name
from ..text import HydraForMaskedLM
from .batches import Batches
from .checkpoints import SaveTimer, newest_whole, remove_old, remove_unfinished, whole_folder
from .trainee import How, Trainee
from .trainer import LAST, WARM_UP
from .workers import Say, Until

STATE = "state.pt"
# Of a run, besides weights and optimizer.
KEPT = (
    "done", "logged", "seconds", "timed", "warm_up", "curve", "training", "paces", "devices", "at_once", "graph",
    "compiled",
)  # fmt: skip
Evaluations = dict[str, tuple[Tensor, Tensor]]  # (inputs, labels) of each held-out text, (rows, length)


class NotFinite(Exception):
    """The training has diverged."""


@dataclass(frozen=True)
class Course:
    """What a run does, whatever the model and the text.

    Args:
        name: that it goes by.
        rate: peak learning rate.
        decay: weight decay, as AdamW has it.
        clip: largest norm of the gradients; 0 for any.
        evaluations: evenly over the run, the last one after its last step.
        evaluate_first: one more before the first step.
        batch_tokens: of a step.
        save_after: seconds between checkpoints, more where saving would take over a twentieth of the time.
        talk_after: seconds between what it says.
    """

    name: str
    steps: int
    rate: float
    decay: float
    clip: float
    seed: int
    evaluations: int
    evaluate_first: bool
    batch_tokens: int
    save_after: float
    talk_after: float = 0.0


def schedule(step: int, steps: int) -> float:
    """The learning rate of a step as a share of its peak: up over 6 % of the steps, then linearly down to 2 %."""
    up = math.ceil(WARM_UP * steps)
    if step < up:
        return (step + 1) / up
    return 1 - (1 - LAST) * (step + 1 - up) / max(1, steps - up)


def own_device() -> torch.device:
    """That runs are computed on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory(compiled: bool = True) -> None:
    """What the run before has left on a GPU; `compiled`: what was compiled is of no more use, either."""
    if torch.cuda.is_available():
        if compiled and "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Clock:
    """Seconds of training alone: not of evaluations, checkpoints or compilation."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self._since = device, seconds, time.perf_counter()

    def start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Training:
    """A run from its newest checkpoint in `folder`, or its start, to its end.

    at_once: runs beside each other, this one included.
    """

    def __init__(
        self,
        course: Course,
        batches: Batches,
        texts: Evaluations,
        net: HydraForMaskedLM,
        folder: Path,
        how: How,
        say: Say,
        at_once: int = 1,
    ) -> None:
        self.course, self.batches, self.folder, self.say = course, batches, folder, say
        self.device = own_device()
        self.texts = {
            name: (inputs.to(self.device), labels.to(self.device)) for name, (inputs, labels) in texts.items()
        }
        self.trainee = Trainee(net, course.rate, course.decay, course.clip, self.device, how, say)
        self.done, self.logged = 0, 0  # steps: all, and those before the last entry of `training`
        self.seconds, self.timed, self.warm_up = 0.0, 0.0, 0.0  # of all steps, of those before that entry, before all
        self.curve: list[dict[str, float]] = []
        self.training: list[list[float]] = []  # step, loss, accuracy
        self.paces: list[float] = []  # seconds a step, of the steps before each of these
        self.devices: list[str] = []  # that it has run on
        self.at_once, self._now = 1, at_once  # runs beside each other: at most, and in this call
        self.graph = self.compiled = True  # whether all of its steps were
        self._said = time.monotonic()

    def fit(self, until: Until) -> bool:
        """Whether it has come to its end. Raises NotFinite."""
        self._restore()
        if (name := device_name(self.device)) not in self.devices:
            self.devices.append(name)
        course, began = self.course, time.perf_counter()
        if course.evaluate_first and not self.curve:
            self._evaluate()
        self.trainee.warm_up(self.batches[self.done][0])
        self.at_once = max(self.at_once, self._now)
        self.graph, self.compiled = self.graph and self.trainee.graph, self.compiled and self.trainee.compiled
        self.warm_up += time.perf_counter() - began
        marks = {round(course.steps * i / course.evaluations) for i in range(1, course.evaluations + 1)}
        clock, timer = Clock(self.device, self.seconds), SaveTimer(course.save_after)
        clock.start()
        while self.done < course.steps:
            rate = course.rate * schedule(self.done, course.steps)
            self.trainee.step(self.batches[self.done], rate, (course.seed << 32) + self.done)
            self.done += 1
            ends, over = self.done == course.steps, until.over()
            evaluate = ends or self.done in marks
            log = evaluate or self.done % max(1, course.steps // 100) == 0
            save = not ends and (over or timer.due)
            if not (log or save):
                continue
            clock.stop()
            self.seconds = clock.seconds
            if log:
                self._log()
            if evaluate:
                self._evaluate()
            if save:
                timer.begin()
                self.save()
                timer.end()
                if over:
                    return False
            clock.start()
        return True

    def _log(self) -> None:
        steps = self.done - self.logged
        found = self.trainee.means(steps)
        self.paces.append((self.seconds - self.timed) / steps)
        self.logged, self.timed = self.done, self.seconds
        if not math.isfinite(found.loss):
            raise NotFinite(f"by step {self.done}, its loss is {found.loss}{self.trainee.doubt()}")
        self.training.append([self.done, round(found.loss, 5), round(found.accuracy, 5)])

    def _evaluate(self) -> None:
        point: dict[str, float] = {
            "step": self.done,
            "tokens": self.done * self.course.batch_tokens,
            "seconds": self.seconds,
        }
        for name, (inputs, labels) in self.texts.items():
            score = self.trainee.score(inputs, labels, self.course.batch_tokens)
            if not math.isfinite(score.loss):
                raise NotFinite(f"by step {self.done}, its held-out loss is {score.loss}")
            point |= {f"{name}_loss": score.loss, f"{name}_accuracy": score.accuracy}
        self.curve.append(point)
        if time.monotonic() - self._said < self.course.talk_after:
            return
        self._said = time.monotonic()
        speed = f"{point['tokens'] / self.seconds:,.0f} tokens/s" if self.seconds else "untrained"
        losses = ", ".join(f"{name} loss {point[f'{name}_loss']:.3f}" for name in self.texts)
        self.say(f"{self.course.name}: step {self.done:,} of {self.course.steps:,}, {losses}; {speed}")

    def save(self) -> None:
        """A checkpoint, which `fit` goes on from."""
        state = {"net": self.trainee.net.state_dict(), "optimizer": self.trainee.optimizer.state_dict()}
        state |= {"total": self.trainee.total} | {name: getattr(self, name) for name in KEPT}
        with whole_folder(self.folder / f"checkpoint-{self.done}") as part:
            torch.save(state, part / STATE)
        remove_old(self.folder)

    def _restore(self) -> None:
        remove_unfinished(self.folder)
        checkpoint = newest_whole(self.folder)
        if checkpoint is None:
            return
        state = torch.load(checkpoint / STATE, map_location=self.device, weights_only=True)
        self.trainee.net.load_state_dict(state["net"])
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        self.trainee.total.copy_(state["total"])
        for name in KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))  # an earlier version has kept less
