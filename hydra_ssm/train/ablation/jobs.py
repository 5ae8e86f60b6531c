"""Many runs, one after the other or several at once, until they are done, the time is over or somebody interrupts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..errors import UserError
from ..records import Record
from ..workers import Event, Say, Until, at_once, one_thread, speak, stopping, together, until
from .run import Key, finished, train


def run_all(out: Path, keys: Sequence[Key], jobs: int, deadline: float, say: Say) -> int | None:
    """Go on with the runs, those that have begun first. Returns the number of the signal that stopped them, if any.

    Of several at once each has one of the GPUs in turn. On a CPU each run has one thread, so that its result does not
    depend on how many there are at once.

    Raises:
        UserError: a run that has not the memory that it needs, or a full disk; the others are saved.
    """
    todo = [key for key in keys if finished(out, key) is None]
    todo.sort(key=lambda key: not key.folder(out).exists())  # stable
    jobs = min(jobs, len(todo)) if time.time() < deadline else 0
    done = Progress(out, len(keys), len(keys) - len(todo), say)
    if jobs <= 1:
        asked: Event = threading.Event()
        with stopping(asked) as received, one_thread():
            for key in todo if jobs else ():
                done.tell(key, _train(out, key, Until(asked, deadline), 1, say))
            return received[0] if received else None
    return together(todo, partial(_work, out, at_once(jobs)), jobs, deadline, done.tell)


class Progress:
    """A line for each run that has ended."""

    def __init__(self, out: Path, runs: int, done: int, say: Say) -> None:
        self.out, self.runs, self.done, self.say = out, runs, done, say

    def tell(self, key: Key, found: Record | None) -> None:
        if found is None:
            return
        self.done += 1
        result = f"diverged {found['diverged']}" if "diverged" in found else (
            f"held-out loss {found['loss']:.3f}, masked accuracy {found['accuracy']:.1%}, "
            f"{1e3 * found['seconds_a_step']:.1f} ms a step"
            + (" without a graph" if torch.cuda.is_available() and not found["graph"] else "")
        )  # fmt: skip
        self.say(f"{key}: {result} ({self.done} of {self.runs})")


def _train(out: Path, key: Key, until: Until, at_once: int, say: Say) -> Record | None:
    try:
        return train(out, key, until, at_once, say)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{key} needs more memory than there is: choose fewer --jobs, or --accumulate for steps in parts"
        ) from error


def _work(out: Path, beside: int, key: Key) -> Record | None:
    return _train(out, key, until(), beside, speak)
