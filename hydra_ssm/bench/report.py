"""Rows of measurements as a table, a plot and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import require

HEADER = (
    f"{'':16}{'batch x length':>15}{'forward':>10}{'step':>10}{'peak':>9}{'tokens':>10}{'of ceilings':>15}\n"
    f"{'':16}{'':15}{'ms':>10}{'ms':>10}{'MB':>9}{'a second':>10}{'forward, step':>15}"
)
MEANING = """
forward      without gradients; times are medians
step         forward and backward, gradients of input and parameters; tokens a second are those of steps
peak         most memory that a step holds above parameters and input
of ceilings  time at the ceilings / measured time. At the ceilings: the projections' products at the matmul's rate, and
             what lies between them at the copy's rate for the bytes it must move at least (every tensor once, nothing
             but what kernels must hand on) or at the matmul's rate for its products, whichever takes longer
"""


@dataclass(frozen=True)
class Row:
    """One layer or product on one shape: milliseconds, MB (1e6 bytes), fractions of the time at the ceilings."""

    name: str
    batch: int
    length: int
    forward: float | None = None
    step: float | None = None
    peak: float | None = None
    tokens_per_second: float | None = None
    forward_of_ceilings: float | None = None
    step_of_ceilings: float | None = None
    note: str = ""

    def __str__(self) -> str:
        shape = f"{self.name:16}{f'{self.batch} x {self.length}':>15}"
        if self.note:
            return f"{shape}   {self.note}"
        peak = "-" if self.peak is None else f"{self.peak:.0f}"
        fractions = f"{self.forward_of_ceilings:.2f}, {self.step_of_ceilings:.2f}"
        return (
            f"{shape}{self.forward:10.3f}{self.step:10.3f}{peak:>9}{_short(self.tokens_per_second):>10}{fractions:>15}"
        )


def _short(number: float | None) -> str:
    """Three digits and a unit of thousands."""
    value = number or 0.0
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
        points = [(r.length, 1e3 * r.step / (r.batch * r.length)) for r in rows if r.name == name and r.step]
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
