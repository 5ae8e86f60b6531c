"""How times and memory grow with the length, beside what each matrix class promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._extras import require
from ..matrices import MATRICES

LAWS: dict[str, Callable[[float], float]] = {
    "L": lambda L: L, "L log L": lambda L: L * math.log2(L), "L^1.5": lambda L: L**1.5, "L^2": lambda L: L**2
}  # fmt: skip
LINEAR = ("L", "L")  # of time and of memory
PROMISES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(MATRICES, LINEAR),
    "dense": ("L^2", "L^2"),
    "attention": ("L^2", "L"),
    "butterfly": ("L^1.5", "L^1.5"),
    "toeplitz": ("L log L", "L"),
    "dft": ("L log L", "L"),
    "vandermonde": ("L log L", "L"),
}
SLACK, OCTAVES = 0.15, 2
HEADER = (
    f"{'':21}{'':>9}{'forward':>10}{'step':>10}{'peak':>9}{'time grows as':>24}{'memory as':>20}\n"
    f"{'':21}{'to L':>9}{'ms':>10}{'ms':>10}{'MB':>9}{'promised, measured':>24}{'promised, measured':>20}"
)
MEANING = f"""
forward, step   milliseconds of M @ x, and of it with the gradients of all that M and x are made of, at the length L;
                on a CPU those that its threads were busy, the least of several
peak            most memory that the step holds above these
grows as        L to the power that is given, over the last {OCTAVES} octaves; promised is what the law grows as there
                x: more than the promise and {SLACK}
"""


@dataclass(frozen=True)
class Point:
    """One class at one length: milliseconds, MB (1e6 bytes)."""

    name: str
    length: int
    forward: float
    step: float
    peak: float | None


@dataclass(frozen=True)
class Growth:
    """Exponents of one class over its last octaves: of a step's time and of its memory, measured and promised."""

    name: str
    law: str
    memory_law: str
    time: float | None
    promised_time: float
    memory: float | None
    promised_memory: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Growth:
        law, memory_law = PROMISES[points[0].name]
        last = points[-1 - OCTAVES :]
        lengths = [p.length for p in last]
        laws = (exponent(lengths, [LAWS[name](n) for n in lengths]) or math.nan for name in (law, memory_law))
        promised_time, promised_memory = laws
        peaks = [p.peak for p in last if p.peak]  # all, or the system does not tell
        memory = exponent(lengths, peaks) if len(peaks) == len(last) else None
        time = exponent(lengths, [p.step for p in last])
        return cls(points[0].name, law, memory_law, time, promised_time, memory, promised_memory)

    @property
    def kept(self) -> bool:
        """Whether neither exponent is above its promise by more than the slack."""
        pairs = ((self.time, self.promised_time), (self.memory, self.promised_memory))
        return all(found is None or found <= promised + SLACK for found, promised in pairs)


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of a line through (log length, log value) by least squares; None for less than two."""
    if len(lengths) < 2:
        return None
    x, y = ([math.log(v) for v in values] for values in (lengths, values))
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def line(point: Point, growth: Growth) -> str:
    """A class's line of the table."""
    peak = "-" if point.peak is None else f"{point.peak:.1f}"
    start = f"{point.name:21}{point.length:>9}{point.forward:>10.2f}{point.step:>10.2f}{peak:>9}"
    time = f"{growth.law} = {growth.promised_time:.2f}, {_power(growth.time)}"
    memory = f"{growth.promised_memory:.2f}, {_power(growth.memory)}"
    return f"{start}{time:>24}{memory:>20}{'' if growth.kept else '  x'}"


def _power(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(path: Path, points: Sequence[Point], title: str) -> None:
    """Time and memory of a step against length, one line a class, beside lines of the laws."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = ("o-", "s--", "^:")
    for axis, part, what in zip(axes, ("step", "peak"), ("milliseconds of a step", "MB of a step"), strict=True):
        for number, name in enumerate(dict.fromkeys(p.name for p in points)):
            own = [(p.length, getattr(p, part)) for p in points if p.name == name and getattr(p, part)]
            if own:
                axis.plot(*zip(*own, strict=True), styles[number // 10], label=name, markersize=3, linewidth=1.2)
        _laws(axis)
        ticks = sorted({p.length for p in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.set(xlabel="length", ylabel=what)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    image = require("PIL.Image", "train")  # comes with matplotlib
    image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def _laws(axis: Any) -> None:
    """Grey lines of slope 1 and 2 along the bottom and the top."""
    axis.set(xscale="log", yscale="log")
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for law, start in (("L", low), ("L^2", high * (left / right) ** 2)):
        values = [start * LAWS[law](x / left) for x in (left, right)]
        axis.plot((left, right), values, color="0.6", linewidth=0.8, zorder=0)
        axis.annotate(law, (right, values[1]), color="0.4", fontsize="small", ha="right", va="bottom")
    axis.set(xlim=(left, right), ylim=(low, high))
