"""Processes that a test starts, waits for and ends: however slow the machine is, and whatever else it does."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 300.0  # seconds: more than anything takes on a busy machine


def wait_until(condition: Callable[[], object], process: subprocess.Popen[Any] | None = None) -> None:
    """Fails where the process that was to bring it about has ended without."""
    end = time.monotonic() + LONGEST
    while True:
        ended = process is not None and process.poll() is not None  # before looking: it may do it and end in between
        if condition():
            return
        assert not ended, process and process.communicate()
        if time.monotonic() > end:
            if process is not None:
                process.kill()
            raise AssertionError(f"it has not come about in {LONGEST:g} s")
        time.sleep(0.005)  # looking takes time from who is looked at


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
