"""Times of repeated runs, and the memory that one takes, on a CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], object]
FLUSH = 1 << 28  # bytes, several times the L2 cache of any GPU


def timed(
    runs: Mapping[Name, Run], device: torch.device, typical: Callable[[list[float]], float] = statistics.median
) -> dict[Name, float]:
    """Typical seconds of each run, after a warm-up."""
    if device.type == "cpu":
        return interleaved(runs, 5, typical)
    return {name: typical(on_gpu(run, device)) for name, run in runs.items()}


def interleaved(
    runs: Mapping[Name, Run], repeats: int, typical: Callable[[list[float]], float] = statistics.median
) -> dict[Name, float]:
    """Typical seconds of each, taken in turns so that a slow minute of the machine falls on all."""
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before each run
    for attempt in range(repeats + 1):
        for name, run in runs.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if attempt:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    gc.unfreeze()
    return {name: typical(values) for name, values in seconds.items()}


def captured(run: Run, device: torch.device) -> Run:
    """The run as a CUDA graph, to be replayed: what the device needs, without Python between its kernels.

    Raises RuntimeError where an operation waits for the device or reads from the host; what comes after is not
    disturbed by that.
    """
    with torch.cuda.device(device):
        own, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(own)
        with torch.cuda.stream(side):  # what is chosen or allocated once must be so before the capture
            for _ in range(2):
                run()
        own.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except BaseException:
            torch.cuda.set_stream(own)  # torch leaves the one that it captures on in its place
            _renew_generator(device)
            raise
    return graph.replay


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: the matrix products of each stream have a workspace of their own, which stays."""
    return torch.cuda.Stream(device)


def _renew_generator(device: torch.device) -> None:
    """After a capture that failed: the state of the device's random numbers believes that it goes on."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(device))


def on_gpu(run: Run, device: torch.device, budget: float = 0.2) -> list[float]:
    """Seconds between two events around a run, the L2 cache overwritten before each; about `budget` seconds."""
    with torch.cuda.device(device):
        for _ in range(3):  # kernels are compiled and chosen
            run()
        estimate = _between_events(run, [None] * 3)
        cache = torch.empty(FLUSH, dtype=torch.uint8, device=device)
        repeats = min(100, max(5, int(budget / max(statistics.mean(estimate), 1e-6))))
        return _between_events(run, [cache] * repeats)


def _between_events(run: Run, caches: list[torch.Tensor | None]) -> list[float]:
    """Seconds of a run after overwriting each of the caches, queued without a wait in between."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in caches]
    torch.cuda.synchronize()
    for flush, (start, end) in zip(caches, pairs, strict=True):
        if flush is not None:
            flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Most bytes held during a run above those held before it; None where the system does not tell.

    On a GPU those of torch's allocator, on a CPU those of the process.
    """
    gc.collect()
    if device.type == "cpu":
        return _peak_of_process(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_process(run: Run) -> int | None:
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free in the process would not be counted when it is used again
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
        before = _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux, or without glibc
        return None
    run()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    """Bytes that /proc states of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate: a class of its own on GPUs, a sentence on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
