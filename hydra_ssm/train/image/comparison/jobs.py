"""Many runs, several at once, until they are done, the time is over or somebody interrupts."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from ...errors import UserError
from ...workers import Event, Say, Until, begin, one_thread, result, speak, stopping, until
from .loop import Record, finished, folder_of, train
from .plan import Job


def run_all(out: Path, data: Path, todo: Sequence[Job], at_once: int, deadline: float, say: Say) -> int | None:
    """Go on with the runs, those that have begun first. Returns the number of the signal that stopped them, if any.

    Raises UserError where a run has not the memory that it needs, or the disk is full; the others are saved.
    """
    left = [job for job in todo if finished(out, job) is None]
    left.sort(key=lambda job: not folder_of(out, job).exists())  # stable
    at_once = min(at_once, len(left)) if time.time() < deadline else 0
    if at_once <= 1:
        asked: Event = threading.Event()
        with stopping(asked) as received, one_thread():
            for job in left if at_once else ():
                tell(job, _train(out, data, job, Until(asked, deadline), 1, say), say)
            return received[0] if received else None
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    with stopping(asked) as received:
        with ProcessPoolExecutor(at_once, context, begin, (Until(asked, deadline), at_once)) as pool:
            futures = {pool.submit(_work, out, data, job, at_once): job for job in left}
            try:
                for future in as_completed(futures):
                    tell(futures[future], result(future, futures[future]), say)
            except BaseException:
                asked.set()  # the others save what they have
                raise
        return received[0] if received else None


def tell(job: Job, found: Record | None, say: Say) -> None:
    """A line for a run that has ended."""
    if found is None:
        return
    if found["diverged"]:
        say(f"{job}: diverged {found['diverged']}")
    else:
        say(f"{job}: top-1 {found['top1']:.2f} %, averaged {found['top1_ema']:.2f} %, {found['seconds']:.0f} s")


def _train(out: Path, data: Path, job: Job, until: Until, at_once: int, say: Say) -> Record | None:
    try:
        return train(out, data, job, until, at_once, say)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{job} needs more memory than there is: choose fewer jobs or a smaller batch_size") from error


def _work(out: Path, data: Path, job: Job, at_once: int) -> Record | None:
    return _train(out, data, job, until(), at_once, speak)
