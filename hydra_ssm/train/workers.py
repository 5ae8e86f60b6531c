"""Runs beside each other: when they stop, on whose word, and what a process does that works for another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import UserError

Say = Callable[[str], None]
Result = TypeVar("Result")
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
        self.until, self.save_after, self.saved = until, save_after, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        if self.until.over():
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self.saved > self.save_after:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved = time.monotonic()


def until() -> Until:
    """When this process stops, which works for another."""
    return _until


def result(future: Future[Result], name: object) -> Result:
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
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

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()
