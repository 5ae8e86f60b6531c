"""One row: times called from Python and replayed as a CUDA graph, memory, and fractions of what is possible."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from .clock import Run, captured, peak_bytes, ran_out_of_memory, timed
from .costs import Cost
from .machine import Ceilings
from .report import Row


def measure(
    name: str, batch: int, length: int, make: Callable[[], dict[str, Run]], device: torch.device,
    limits: tuple[tuple[Cost, Cost], Ceilings] | None = None,
) -> Row:  # fmt: skip
    """The row of what `make` makes, `forward`, `step` or both, or of its lack of memory.

    limits: what a token costs at least, forward and backward, and the rates that it is paid at. What does not let
    itself be captured has no times of a replay, and a warning says why.
    """
    try:
        return _measured(Row(name, batch, length), make(), device, limits)
    except RuntimeError as problem:
        if not ran_out_of_memory(problem):
            raise
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(name, batch, length, note="out of memory")


def _measured(
    row: Row, runs: dict[str, Run], device: torch.device, limits: tuple[tuple[Cost, Cost], Ceilings] | None
) -> Row:
    eager = timed(runs, device)
    peak = peak_bytes(runs["step"], device) if "step" in runs else None
    graph = _replayed(row.name, runs, device) if device.type == "cuda" else {}
    best = eager | graph
    tokens = row.batch * row.length
    fractions: list[float | None] = [None, None]
    if limits is not None:
        (forward, backward), ceilings = limits
        at_least = {"forward": forward.seconds(ceilings)}
        at_least["step"] = at_least["forward"] + backward.seconds(ceilings)
        fractions = [tokens * at_least[part] / best[part] if part in best else None for part in ("forward", "step")]
    milliseconds = {part: 1e3 * found for part, found in eager.items()}
    milliseconds |= {f"graph_{part}": 1e3 * found for part, found in graph.items()}
    return replace(
        row,
        **milliseconds,  # type: ignore[arg-type]
        peak=None if peak is None else peak / 1e6,
        tokens_per_second=tokens / best["step"] if "step" in best else None,
        forward_of_ceilings=fractions[0],
        step_of_ceilings=fractions[1],
    )


def _replayed(name: str, runs: dict[str, Run], device: torch.device) -> dict[str, float]:
    """Seconds of the runs' CUDA graphs, one at a time in memory."""
    try:
        return {part: timed({part: captured(run, device)}, device)[part] for part, run in runs.items()}
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # a library's of which nobody has tried this version, or compiled code
        told = " ".join(str(problem).split())[:100]
        warnings.warn(f"{name} cannot be captured: {type(problem).__name__}: {told}", stacklevel=2)
        return {}
