"""One row: times called from Python and replayed as a CUDA graph, memory, and fractions of what is possible."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from .clock import Run, captured, peak_bytes, ran_out_of_memory, timed
from .costs import Cost
from .machine import Ceilings
from .report import Row


def measure(
    name: str, batch: int, length: int, make: Callable[[], dict[str, Run]], device: torch.device,
    limits: tuple[tuple[Cost, Cost], Ceilings] | None = None, *, ours: bool = True,
) -> Row:  # fmt: skip
    """The row of what `make` makes, `forward`, `step` or both, or of its lack of memory.

    limits: what a token costs at least, forward and backward, and the rates that it is paid at. Not all that is not
    ours lets itself be captured.
    """
    try:
        return _measured(Row(name, batch, length), make(), device, limits, ours)
    except RuntimeError as problem:
        if not ran_out_of_memory(problem):
            raise
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(name, batch, length, note="out of memory")


def _measured(
    row: Row, runs: dict[str, Run], device: torch.device, limits: tuple[tuple[Cost, Cost], Ceilings] | None, ours: bool
) -> Row:
    eager = timed(runs, device)
    peak = peak_bytes(runs["step"], device) if "step" in runs else None
    graph: dict[str, float] = {}
    if device.type == "cuda":
        with contextlib.nullcontext() if ours else contextlib.suppress(Exception):
            graph = {name: timed({name: captured(run, device)}, device)[name] for name, run in runs.items()}
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
