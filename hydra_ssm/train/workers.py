"""Runs beside each other: when they stop, on whose word, and what a process does that works for another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import SaveTimer
from .errors import UserError

Say = Callable[[str], None]
Key = TypeVar("Key")
Result = TypeVar("Result")
MOST_JOBS = 8  # on a CPU, where nobody says how many
VISIBLE = "CUDA_VISIBLE_DEVICES"
STOPPING = (signal.SIGINT, signal.SIGTERM)
_until: Until  # of this process, where it works for another


def speak(text: str) -> None:
    """At once, also where the output is no terminal."""
    print(text, flush=True)


class Event(Protocol):
    """Of threads or of processes."""

    def is_set(self) -> bool: ...
    def set(self) -> None: ...


@dataclass(frozen=True)
class Until:
    """When runs stop: at a time of the clock, or when somebody asks."""

    asked: Event
    deadline: float  # as time.time()

    def over(self) -> bool:
        return self.asked.is_set() or time.time() >= self.deadline


class Stops(TrainerCallback):
    """Saves a checkpoint every so many seconds, and when the run has to stop before its end."""

    def __init__(self, until: Until, save_after: float) -> None:
        self.until, self.timer = until, SaveTimer(save_after)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        if self.until.over():
            control.should_save = control.should_training_stop = True
        elif self.timer.due:
            control.should_save = True
        if control.should_save:
            self.timer.begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.timer.end()


def until() -> Until:
    """When this process stops, which works for another."""
    return _until


def together(
    todo: Sequence[Key],
    work: Callable[[Key], Result],
    jobs: int,
    deadline: float,
    tell: Callable[[Key, Result], None],
    waits_for: Callable[[Key], Key | None] = lambda key: None,
) -> int | None:
    """Does all of that in processes of their own, so many at once, spread over the GPUs, and tells what each has found.

    `work` asks `until` when to stop. Returns the number of the signal that stopped them, if any.

    Raises:
        UserError: a process has died. After that and any other error the others keep what they have.
    """
    context = multiprocessing.get_context("spawn")
    asked = context.Event()
    with stopping(asked) as received, ExitStack() as stack:
        free = _processes(jobs, context, Until(asked, deadline), stack)
        waiting = list(todo)
        running: dict[Future[Result], tuple[Key, ProcessPoolExecutor]] = {}
        try:
            while waiting or running:
                under_way = [*waiting, *(key for key, _ in running.values())]
                ready = [key for key in waiting if waits_for(key) not in under_way]
                for key in ready[: len(free)]:
                    waiting.remove(key)
                    pool = free.pop(0)
                    running[_submitted(pool, work, key)] = key, pool
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    key, pool = running.pop(future)
                    tell(key, _result(future, key))
                    free.append(pool)
        except BaseException:
            asked.set()
            raise
        return received[0] if received else None


def gpus() -> list[str]:
    """The names of those that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    named, count = os.environ.get(VISIBLE, ""), torch.cuda.device_count()
    names = [name.strip() for name in named.split(",") if name.strip()] or [str(i) for i in range(count)]
    return names[:count]


def usual_jobs() -> int:
    """One for each GPU, and on a CPU as many as it has cores, but 8 at most."""
    return torch.cuda.device_count() if torch.cuda.is_available() else min(MOST_JOBS, torch.get_num_threads())


def at_once(jobs: int) -> int:
    """How many of so many runs beside each other share a device."""
    return -(-jobs // max(1, len(gpus())))


def _processes(jobs: int, context: Any, until: Until, stack: ExitStack) -> list[ProcessPoolExecutor]:
    """Pools of one process each, that see one GPU each. It must not be told later: importing may use CUDA."""
    before, own = os.environ.get(VISIBLE), gpus()
    pools = [stack.enter_context(ProcessPoolExecutor(1, context, begin, (until, jobs))) for _ in range(jobs)]
    try:
        with _blocked():  # what a group of processes is sent would end those that import still
            for place, pool in enumerate(pools):
                if own:
                    os.environ[VISIBLE] = own[place % len(own)]
                pool.submit(int)  # starts the process
    finally:
        if before is not None:
            os.environ[VISIBLE] = before
        else:
            os.environ.pop(VISIBLE, None)
    return pools


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals that stop come afterwards, and to a process that is started here once it has unblocked them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _submitted(pool: ProcessPoolExecutor, work: Callable[[Key], Result], key: Key) -> Future[Result]:
    """A run of a process, which may have died while it had none: the future tells."""
    try:
        return pool.submit(work, key)
    except BrokenProcessPool as error:
        broken: Future[Result] = Future()
        broken.set_exception(error)
        return broken


def _result(future: Future[Result], name: object) -> Result:
    """What a process has found. Raises UserError where it has died."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a process has died, with {name} or a run beside it, perhaps for want of memory: the same command goes "
            "on, with fewer --jobs if it was that"
        ) from None


def begin(until: Until, jobs: int) -> None:
    """What a process that works for another does first."""
    global _until
    _until = until
    for number in STOPPING:  # a terminal sends it to all, and the parent decides
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    end_with_parent()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs) if torch.cuda.is_available() else 1)


def end_with_parent() -> None:
    """A parent that was killed cannot stop its children, and what they save would be in the way of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


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

    before = {number: signal.signal(number, receive) for number in STOPPING}
    try:
        yield received
    finally:
        restore()
