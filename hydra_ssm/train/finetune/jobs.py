"""Many runs, one after the other or several at once, each after the one that it starts from."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..ablation.jobs import one_thread, stopping
from ..ablation.run import Event, Say, Until
from ..errors import UserError
from .run import Key, Record, finished, train
from .tasks import MNLI, TASKS

MOST_JOBS = 8  # on a CPU, where nobody says how many

_until: Until  # of this process, where it works for another


def usual_jobs() -> int:
    """One for each GPU, and on a CPU as many as it has cores, but 8 at most."""
    return torch.cuda.device_count() if torch.cuda.is_available() else min(MOST_JOBS, torch.get_num_threads())


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
    return _together(out, todo, direct, jobs, deadline, done)


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


def _together(out: Path, todo: list[Key], direct: bool, jobs: int, deadline: float, done: Progress) -> int | None:
    """In processes of their own, spread over the GPUs."""
    context = multiprocessing.get_context("spawn")
    asked, places = context.Event(), context.Queue()
    for place in range(jobs):
        places.put(place)
    with stopping(asked) as received:
        with ProcessPoolExecutor(jobs, context, _begin, (Until(asked, deadline), places, jobs)) as pool:
            waiting = list(todo)
            running: dict[Future[Record | None], Key] = {}
            try:
                while waiting or running:
                    ready = [key for key in waiting if direct or _waits_for(key) not in {*waiting, *running.values()}]
                    running |= {pool.submit(_work, out, key): key for key in ready}
                    waiting = [key for key in waiting if key not in ready]
                    ended, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ended:
                        key = running.pop(future)
                        done.tell(key, _result(future, key))
            except BaseException:
                asked.set()  # the others keep what they have
                raise
        return received[0] if received else None


def _waits_for(key: Key) -> Key | None:
    return Key(MNLI, key.seed) if TASKS[key.task].after_mnli else None


def _result(future: Future[Record | None], key: Key) -> Record | None:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a process has died, with {key} or a run beside it, perhaps for want of memory: the same command goes on, "
            "with fewer --jobs if it was that"
        ) from None


def _begin(until: Until, places: Any, jobs: int) -> None:
    """What a process that works for another does first: it takes one GPU, and ends with its parent."""
    global _until
    _until = until
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    if gpus := visible(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]  # nothing has used CUDA here yet
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    else:
        torch.set_num_threads(1)


def visible(named: str | None, count: Callable[[], int]) -> list[str]:
    """The names of the GPUs that this process may use."""
    return [name for name in named.split(",") if name] if named is not None else [str(i) for i in range(count())]


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its children, and what they write would be in the way of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(out: Path, key: Key) -> Record | None:
    return _train(out, key, _until)


def _train(out: Path, key: Key, until: Until) -> Record | None:
    try:
        return train(out, key, until)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{key} needs more memory than there is: choose fewer --jobs, or a smaller --batch-size"
        ) from error
