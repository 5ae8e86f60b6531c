"""Many runs, several at once, until they are done, the time is over or somebody interrupts."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import UserError, in_a_line
from ...records import Record
from ...workers import Event, Say, Until, at_once, one_thread, speak, stopping, together, until
from .loop import failure_of, finished, folder_of, train
from .plan import Job


class Failed(NamedTuple):
    """What came of a run in place of a record. `lost`: nothing, as the device had failed its process before."""

    told: str
    lost: bool = False


Outcome = Record | Failed | None


class Ended(NamedTuple):
    """How a round of runs came to its end.

    signal: the number of the one that stopped them, if any; failed: what could not be run, and why.
    """

    signal: int | None
    failed: list[str]

    def then(self, following: Callable[[], Ended]) -> Ended:
        """And what comes after it, unless a signal has come."""
        if self.signal is not None:
            return self
        after = following()
        return Ended(after.signal, self.failed + after.failed)


def run_all(out: Path, data: Path, todo: Sequence[Job], jobs: int, deadline: float, say: Say) -> Ended:
    """Go on with the runs, those that have begun first and those that failed last. A run that fails stops no other.

    Raises UserError where a process has died or the disk is full; the others are saved.
    """
    left = [job for job in todo if finished(out, job) is None]
    left.sort(key=lambda job: (failure_of(out, job).exists(), not folder_of(out, job).exists()))  # stable
    failed: list[str] = []
    signal = None
    while left and signal is None and time.time() < deadline:
        count = min(jobs, len(left))
        found, signal = (_several if count > 1 else _one_by_one)(out, data, left, count, deadline, say)
        lost = [job for job, outcome in found.items() if isinstance(outcome, Failed) and outcome.lost]
        failed += [f"{job}: {o.told}" for job, o in found.items() if isinstance(o, Failed) and not o.lost]
        if lost and len(lost) == len(left):
            raise UserError(f"{lost[0]} and {len(lost) - 1} others have no device that works")
        left = lost  # in new processes
    return Ended(signal, failed)


def _one_by_one(
    out: Path, data: Path, left: Sequence[Job], count: int, deadline: float, say: Say
) -> tuple[dict[Job, Outcome], int | None]:
    asked: Event = threading.Event()
    found: dict[Job, Outcome] = {}
    with stopping(asked) as received, one_thread():
        for job in left:
            found[job] = _train(out, data, job, Until(asked, deadline), count, say)
            tell(job, found[job], say)
    return found, received[0] if received else None


def _several(
    out: Path, data: Path, left: Sequence[Job], count: int, deadline: float, say: Say
) -> tuple[dict[Job, Outcome], int | None]:
    found: dict[Job, Outcome] = {}

    def ended(job: Job, outcome: Outcome) -> None:
        found[job] = outcome
        tell(job, outcome, say)

    try:
        return found, together(left, partial(_work, out, data, at_once(count)), count, deadline, ended)
    except UserError as error:
        for job in left:  # any of these may have been what the process died of: they are last the next time
            if folder_of(out, job).exists() and finished(out, job) is None:
                failure_of(out, job).write_text(f"{error}\n", encoding="utf-8")
        raise


def tell(job: Job, found: Outcome, say: Say) -> None:
    """A line for a run that has ended."""
    if isinstance(found, Failed):
        if not found.lost:
            say(f"{job} failed: {found.told}")
    elif found is not None and found["diverged"]:
        say(f"{job}: diverged {found['diverged']}")
    elif found is not None:
        say(f"{job}: top-1 {found['top1']:.2f} %, averaged {found['top1_ema']:.2f} %, {found['seconds']:.0f} s")


def device_works() -> bool:
    """Whether this process can still use its GPU: after some errors none of its calls returns."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def _train(out: Path, data: Path, job: Job, until: Until, beside: int, say: Say) -> Outcome:
    if not until.over() and not device_works():
        return Failed("its device does not work", lost=True)
    try:
        return train(out, data, job, until, beside, say)
    except UserError:
        raise
    except Exception as error:  # of a kernel, a compiler, a library: the other rows have nothing to do with it
        short = isinstance(error, torch.OutOfMemoryError)
        told = "it needs more memory than there is: choose fewer jobs or a smaller batch_size" if short else ""
        failure_of(out, job).parent.mkdir(parents=True, exist_ok=True)
        failure_of(out, job).write_text(traceback.format_exc(), encoding="utf-8")
        return Failed(told or in_a_line(error))


def _work(out: Path, data: Path, beside: int, job: Job) -> Outcome:
    return _train(out, data, job, until(), beside, speak)
