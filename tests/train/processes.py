"""Processes that a test starts, waits for and ends: however slow the machine is, and whatever else it does."""

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

LONGEST = 300.0  # seconds: more than anything takes on a busy machine
IMPORTED = ("hydra_ssm.train.pretrain", "hydra_ssm.train.comparison", "hydra_ssm.train.image.comparison",
            "hydra_ssm.train.image.training", "hydra_ssm.train.data.prepare", "hydra_ssm.train.finetune",
            "matplotlib.figure")  # fmt: skip


def warm() -> ForkServerContext:
    """Processes out of one that has imported what takes seconds, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    return context


def start(target: Callable[..., object], *arguments: object, **settings: object) -> ForkServerProcess:
    """A process that calls it, on one thread."""
    process = warm().Process(target=_quietly, args=(target, arguments, settings))
    process.start()
    return process


def _quietly(target: Callable[..., object], arguments: tuple[object, ...], settings: dict[str, object]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # its own processes begin as those of any other do
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    target(*arguments, **settings)


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[Any] | ForkServerProcess | None = None
) -> None:
    """Fails where the process that was to bring it about has ended without."""
    end = time.monotonic() + LONGEST
    while True:
        ended = process is not None and _ended(process)  # before looking: it may do it and end in between
        if condition():
            return
        assert not ended, process.communicate() if isinstance(process, subprocess.Popen) else process
        if time.monotonic() > end:
            if process is not None:
                process.kill()
            raise AssertionError(f"it has not come about in {LONGEST:g} s")
        time.sleep(0.005)  # looking takes time from who is looked at


def _ended(process: subprocess.Popen[Any] | ForkServerProcess) -> bool:
    return (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is not None


def children(pid: int) -> list[int]:
    """Process ids; none where the system is not Linux."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [*map(int, tasks.read_text(encoding="utf-8").split())] if tasks.exists() else []


def alive(pid: int) -> bool:
    """Whether it runs; one whose parent has not asked for its end yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
