"""What a comparison has found: a table, a picture of the curves, JSON."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...._extras import require
from ...records import read_records
from .loop import RUNS, failures
from .plan import ROWS, Job, Plan
from .speed import RESOLUTIONS, SPEED, read

Report = dict[str, Any]
EDGE, PYTHON = "!", "*"
BAR = ("hydra_vit", "vit")
TRIAL = "small: it shows that the command works; models so small, trained so briefly, say nothing of the others"
MARKS = {
    EDGE: "the best learning rate is the highest or the lowest that was tried: this row may not be at its best",
    PYTHON: "no CUDA graph: called from Python, whose time is in it",
}


def tried_rates(out: Path, plan: Plan, row: str) -> dict[float, float]:
    """The scores of the learning rates that a row has tried, once it has tried the plan's; else none."""
    records = [r for r in read_records(out / RUNS) if r["row"] == row and r["tuning"]]
    tried = {r["learning_rate"]: _better(r) for r in records}
    return tried if tried.keys() >= set(plan.learning_rates) else {}


def further_jobs(out: Path, plan: Plan, rows: Sequence[str]) -> list[Job]:
    """The next runs by which learning rates are chosen, for rows whose best one is the highest or the lowest."""
    wanted = {row: plan.further(tried) for row in rows if (tried := tried_rates(out, plan, row))}
    return [Job(row, rate, 0, True) for row, rate in wanted.items() if rate is not None]


def best_rates(out: Path, plan: Plan, rows: Sequence[str]) -> dict[str, float]:
    """The learning rate of each row whose candidates have all been tried, by top-1 of the better weights."""
    if len(plan.learning_rates) == 1:
        return dict.fromkeys(rows, plan.learning_rates[0])
    scores = {row: tried for row in rows if (tried := tried_rates(out, plan, row)) and plan.further(tried) is None}
    return {row: max(sorted(tried), key=tried.__getitem__) for row, tried in scores.items()}


def _better(record: dict[str, Any]) -> float:
    """Of the raw and the averaged weights; a run that diverged is the worst."""
    return -1.0 if record["diverged"] else max(record["top1"], record["top1_ema"])


def collect(out: Path, plan: Plan, facts: dict[str, Any]) -> Report:
    """All records, and a summary of each row, the best first."""
    records = read_records(out / RUNS)
    tuning = [r for r in records if r["tuning"]]
    runs = [r for r in records if not r["tuning"]]
    speed = read(out / SPEED)
    rows = [_row(row, records, speed["rows"].get(row)) for row in ROWS]
    rows = [row for row in rows if row["seeds"] or row["speed"]]
    rows.sort(key=lambda row: -(row["top1_ema"] or {"mean": -1})["mean"])
    return {
        "date": time.strftime("%Y-%m-%d"), "plan": asdict(plan), "data": facts, "rows": rows, "runs": runs,
        "tuning": [{k: v for k, v in r.items() if k != "curve"} for r in tuning],
        "machine": speed["machine"], "resolutions": read(out / RESOLUTIONS),
        "failed": {file.stem: file.read_text(encoding="utf-8").strip().splitlines()[-1:] for file in failures(out)},
    }  # fmt: skip


def _row(row: str, records: list[dict[str, Any]], speed: dict[str, Any] | None) -> dict[str, Any]:
    runs = [r for r in records if r["row"] == row and not r["tuning"]]
    rates = sorted(r["learning_rate"] for r in records if r["row"] == row and r["tuning"])
    whole = [r for r in runs if not r["diverged"]]
    found: dict[str, Any] = {
        "row": row, "about": ROWS[row], "seeds": [r["seed"] for r in whole], "diverged": len(runs) - len(whole),
        "parameters": runs[0]["parameters"] if runs else None, "speed": speed,
        "learning_rate": runs[0]["learning_rate"] if runs else None,
        "rate_at_edge": bool(runs and rates and runs[0]["learning_rate"] in (rates[0], rates[-1])),
    }  # fmt: skip
    for name in ("top1", "top1_ema", "top5", "top5_ema"):
        values = [r[name] for r in whole]
        found[name] = _mean(values) if values else None
    return found


def _mean(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(report: Report) -> str:
    """For a terminal."""
    lines = [f"{'':14}{'parameters':>11}{'rate':>9}{'top-1':>15}{'averaged':>15}{'pictures/s':>12}{'MB':>8}  seeds"]
    notes = []
    for row in report["rows"]:
        speed = row["speed"] or {}
        rate, peak = speed.get("pictures_per_second_step"), speed.get("peak")
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        pictures = (f"{rate:,.0f}" if rate else "-") + (PYTHON if from_python(row) else "")
        lines.append(
            f"{row['row']:14}{parameters:>11}{learning_rate(row):>9}{plus_minus(row['top1']):>15}"
            f"{plus_minus(row['top1_ema']):>15}{pictures:>12}{f'{peak:,.0f}' if peak else '-':>8}  {seeds(row)}"
        )
        notes += [mark for mark in (EDGE, PYTHON) if mark in lines[-1]]
    trial = [TRIAL] if report["plan"]["size"] == "small" else []
    return "\n".join([*lines, *lead(report), *(f"{mark} {MARKS[mark]}" for mark in dict.fromkeys(notes)), *trial])


def lead(report: Report) -> list[str]:
    """A line: how far Hydra-ViT is before the ViT, mean and standard deviation over seeds that both came through."""
    own, other = ({r["seed"]: r for r in report["runs"] if r["row"] == row and not r["diverged"]} for row in BAR)
    shared = sorted(own.keys() & other.keys())
    if not shared:
        return []
    found = []
    for name, kind in (("top1_ema", "averaged"), ("top1", "raw")):
        points = _mean([own[seed][name] - other[seed][name] for seed in shared])
        found.append(f"{kind} {points['mean']:+.2f} ± {points['std']:.2f}")
    return [f"{BAR[0]} less {BAR[1]}, seed by seed ({len(shared)}): top-1 {', '.join(found)} points"]


def learning_rate(row: dict[str, Any]) -> str:
    """With a mark where it is the highest or the lowest that the row has tried."""
    return f"{row['learning_rate'] or 0:g}" + (EDGE if row["rate_at_edge"] else "")


def seeds(row: dict[str, Any]) -> str:
    """How many runs the means are of, and how many more diverged."""
    return f"{len(row['seeds'])}" + (f", {row['diverged']} diverged" if row["diverged"] else "")


def from_python(row: dict[str, Any]) -> bool:
    """Whether a GPU's time of a row has Python's in it, as no CUDA graph could be made."""
    return bool((row["speed"] or {}).get("graph") is False and row["speed"].get("device") == "cuda")


def plus_minus(value: dict[str, float] | None) -> str:
    """Mean and standard deviation in per cent."""
    return "-" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f}"


def draw(report: Report, path: Path) -> None:
    """Top-1 by epoch of every row: the mean over the seeds of the averaged weights, and of the raw ones dashed."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(report["rows"]):
        curves = [r["curve"] for r in report["runs"] if r["row"] == row["row"] and not r["diverged"]]
        for name, style in (("top1_ema", "-"), ("top1", ":")):
            points = _mean_curve(curves, name)
            if points:
                label = row["row"] if name == "top1_ema" else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xlabel="epoch", ylabel="top-1, % (averaged weights; raw ones dotted)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _mean_curve(curves: list[list[dict[str, float]]], name: str) -> list[tuple[float, float]]:
    by_epoch: dict[float, list[float]] = {}
    for curve in curves:
        for entry in curve:
            if name in entry:
                by_epoch.setdefault(entry["epoch"], []).append(entry[name])
    return [(epoch, statistics.mean(values)) for epoch, values in sorted(by_epoch.items())]
