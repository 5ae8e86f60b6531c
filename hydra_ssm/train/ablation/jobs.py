"""Many runs, one after the other or several at once, until they are done, the time is over or somebody interrupts."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from ..errors import UserError
from .run import Event, Key, Record, Say, Until, finished, speak, train

_until: Until  # of this process, where it works for another


def run_all(out: Path, keys: Sequence[Key], jobs: int, deadline: float, say: Say) -> int | None:
    """Go on with the runs, those that have begun first. Returns the number of the signal that stopped them, if any.

    On a CPU each run has one thread, so that its result does not depend on how many there are at once.

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
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    with stopping(asked) as received:
        with ProcessPoolExecutor(jobs, context, _begin, (Until(asked, deadline), jobs)) as pool:
            futures = {pool.submit(_work, out, key, jobs): key for key in todo}
            try:
                for future in as_completed(futures):
                    done.tell(futures[future], _result(future, futures[future]))
            except BaseException:
                asked.set()  # the others save what they have
                raise
        return received[0] if received else None


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
        )  # fmt: skip
        self.say(f"{key}: {result} ({self.done} of {self.runs})")


def _train(out: Path, key: Key, until: Until, at_once: int, say: Say) -> Record | None:
    try:
        return train(out, key, until, at_once, say)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{key} needs more memory than there is: choose fewer --jobs, or --accumulate for steps in parts"
        ) from error


def _result(future: Future[Record | None], key: Key) -> Record | None:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a process has died, with {key} or a run beside it, perhaps for want of memory: the same command goes on, "
            "with fewer --jobs if it was that"
        ) from None


def _begin(until: Until, jobs: int) -> None:
    """What a process that works for another does first."""
    global _until
    _until = until
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs) if torch.cuda.is_available() else 1)


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its children, and what they save would be in the way of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(out: Path, key: Key, jobs: int) -> Record | None:
    return _train(out, key, _until, jobs, speak)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stopping(asked: Event) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM sets the event, the second does what it did before. Yields those that came."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals come to the main thread alone
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()
