"""Rows of measurements as a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import require

_COLUMNS = f"{'':21}{'batch x length':>14}{'forward':>9}{'step':>9}{'forward':>9}{'step':>9}{'MB':>7}{'a second':>10}"
ENCODER_HEADER = f"{'':35}{'replayed':>18}{'from Python':>18}{'peak':>7}{'tokens':>10}\n{_COLUMNS}"
HEADER = ENCODER_HEADER.replace("\n", f"{'of ceilings':>15}\n") + f"{'forward, step':>15}"
MEANING = """
replayed     milliseconds of a CUDA graph's replay, what the device needs: medians, the L2 cache overwritten before each
from Python  milliseconds of the same called from Python: what exceeds the former is Python's share
forward      without gradients
step         forward and backward, gradients of input and parameters; tokens a second are those of steps
peak         most memory that a step holds above parameters and input
of ceilings  time at the ceilings / measured time. At the ceilings: the projections' products at the matmul's rate, and
             what lies between them at the copy's rate for the bytes it must move at least (every tensor once, nothing
             but what kernels must hand on) or at the matmul's rate for its products, whichever takes longer
             Tokens and ceilings are those of the replay where there is one.
"""


@dataclass(frozen=True)
class Row:
    """One model or product on one shape: milliseconds, MB (1e6 bytes), fractions of the time at the ceilings.

    None is what was not measured, or cannot be on this device.
    """

    name: str
    batch: int
    length: int
    forward: float | None = None
    step: float | None = None
    graph_forward: float | None = None
    graph_step: float | None = None
    peak: float | None = None
    tokens_per_second: float | None = None
    forward_of_ceilings: float | None = None
    step_of_ceilings: float | None = None
    compiled: bool | None = None
    note: str = ""

    @property
    def best_step(self) -> float | None:
        """Milliseconds of a step replayed, or called from Python where there is no replay."""
        return self.step if self.graph_step is None else self.graph_step

    def __str__(self) -> str:
        shape = f"{self.name:21}{f'{self.batch} x {self.length}':>14}"
        if self.note:
            return f"{shape}   {self.note}"
        times = [f"{_number(t, '.3f'):>9}" for t in (self.graph_forward, self.graph_step, self.forward, self.step)]
        last = {True: "compiled", False: "not compiled"}.get(self.compiled, "")  # type: ignore[arg-type]
        if self.forward_of_ceilings is not None or self.step_of_ceilings is not None:
            last = ", ".join(_number(f, ".2f") for f in (self.forward_of_ceilings, self.step_of_ceilings))
        return f"{shape}{''.join(times)}{_number(self.peak, '.0f'):>7}{_short(self.tokens_per_second):>10}{last:>15}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(number: float | None) -> str:
    """Three digits and a unit of thousands."""
    if number is None:
        return "-"
    value = number
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Microseconds a token of a step against length, one line a layer."""
    # Without pyplot: no display, no global state.
    figure = require("matplotlib.figure", "train").Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row.name for row in rows):
        points = [(r.length, 1e3 * r.best_step / (r.batch * r.length)) for r in rows if r.name == name and r.best_step]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="length", ylabel="forward and backward, µs a token", title=title)
    ticks = sorted({row.length for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
