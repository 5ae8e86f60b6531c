"""Many runs, one after the other or several at once, each after the one that it starts from."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..records import Record
from ..workers import Event, Say, Until, begin, one_thread, result, stopping, until
from .run import Key, finished, train
from .tasks import MNLI, TASKS

MOST_JOBS = 8  # on a CPU, where nobody says how many


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
    asked = context.Event()
    with stopping(asked) as received, ExitStack() as stack:
        free = _processes(jobs, context, Until(asked, deadline), stack)
        waiting = list(todo)
        running: dict[Future[Record | None], tuple[Key, ProcessPoolExecutor]] = {}
        try:
            while waiting or running:
                under_way = {*waiting, *(key for key, _ in running.values())}
                ready = [key for key in waiting if direct or _waits_for(key) not in under_way]
                for key in ready[: len(free)]:
                    waiting.remove(key)
                    pool = free.pop()
                    running[pool.submit(_work, out, key)] = key, pool
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key, pool = running.pop(future)
                    done.tell(key, result(future, key))
                    free.append(pool)
        except BaseException:
            asked.set()  # the others keep what they have
            raise
        return received[0] if received else None


def _processes(jobs: int, context: Any, until: Until, stack: ExitStack) -> list[ProcessPoolExecutor]:
    """Pools of one process each, that see one GPU each. It must not be told later: importing may use CUDA."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    gpus = visible(before, torch.cuda.device_count)
    pools = [stack.enter_context(ProcessPoolExecutor(1, context, begin, (until, jobs))) for _ in range(jobs)]
    try:
        for place, pool in enumerate(pools):
            if gpus:
                os.environ[name] = gpus[place % len(gpus)]
            pool.submit(int)  # starts the process
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)
    return pools


def _waits_for(key: Key) -> Key | None:
    return Key(MNLI, key.seed) if TASKS[key.task].after_mnli else None


def visible(named: str | None, count: Callable[[], int]) -> list[str]:
    """The names of the GPUs that this process may use."""
    return [name for name in named.split(",") if name] if named is not None else [str(i) for i in range(count())]


def _work(out: Path, key: Key) -> Record | None:
    return _train(out, key, until())


def _train(out: Path, key: Key, until: Until) -> Record | None:
    try:
        return train(out, key, until)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{key} needs more memory than there is: choose fewer --jobs, or a smaller --batch-size"
        ) from error
