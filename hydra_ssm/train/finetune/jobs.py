"""Many runs, one after the other or several at once, each after the one that it starts from."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..records import Record
from ..workers import Event, Say, Until, one_thread, stopping, together, until
from .run import Key, finished, train
from .tasks import MNLI, TASKS


def run_all(out: Path, keys: Sequence[Key], direct: bool, jobs: int, deadline: float, say: Say) -> int | None:
    """Go on with the runs, those that have begun first. Returns the number of the signal that stopped them, if any.

    On a CPU each run has one thread, so that its result does not depend on how many there are at once.

    Raises:
        UserError: a run that has not the memory that it needs, or a full disk; the others are kept.
    """
    todo = [key for key in keys if finished(out, key) is None]
    todo.sort(key=lambda key: (key.task != MNLI, not key.folder(out).exists()))  # stable
    done = Progress(len(keys), len(keys) - len(todo), say)
    jobs = min(jobs, len(todo)) if time.time() < deadline else 0
    if jobs <= 1:
        asked: Event = threading.Event()
        with stopping(asked) as received, one_thread():
            for key in todo if jobs else ():
                done.tell(key, _train(out, key, Until(asked, deadline)))
            return received[0] if received else None
    waits_for = _after_none if direct else _waits_for
    return together(todo, partial(_work, out), jobs, deadline, done.tell, waits_for)


class Progress:
    """A line for each run that has ended."""

    def __init__(self, runs: int, done: int, say: Say) -> None:
        self.runs, self.done, self.say = runs, done, say

    def tell(self, key: Key, found: Record | None) -> None:
        if found is None:
            return
        self.done += 1
        named = (f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in found.get("scores", {}).items())
        result = f"diverged {found['diverged']}" if "diverged" in found else f"{', '.join(named)}"
        self.say(f"{key}: {result} ({self.done} of {self.runs})")


def _after_none(key: Key) -> None:
    """All may begin at once."""


def _waits_for(key: Key) -> Key | None:
    return Key(MNLI, key.seed) if TASKS[key.task].after_mnli else None


def _work(out: Path, key: Key) -> Record | None:
    return _train(out, key, until())


def _train(out: Path, key: Key, until: Until) -> Record | None:
    try:
        return train(out, key, until)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{key} needs more memory than there is: choose fewer --jobs, or a smaller --batch-size"
        ) from error
