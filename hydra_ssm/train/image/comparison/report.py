"""What a comparison has found: a table, a picture of the curves, JSON."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...._extras import require
from ...checkpoints import whole_file
from .loop import RUNS, finished
from .plan import ROWS, Job, Plan
from .speed import RESOLUTIONS, SPEED, read

Report = dict[str, Any]


def best_rates(out: Path, plan: Plan, rows: list[str]) -> dict[str, float]:
    """The learning rate of each row whose candidates have all been tried, by top-1 of the better weights."""
    if len(plan.learning_rates) == 1:
        return dict.fromkeys(rows, plan.learning_rates[0])
    found = {}
    for row in rows:
        tried = {rate: finished(out, Job(row, rate, 0, True)) for rate in plan.learning_rates}
        if all(tried.values()):
            found[row] = max(tried, key=lambda rate: _better(tried[rate] or {}))
    return found


def _better(record: dict[str, Any]) -> float:
    """Of the raw and the averaged weights; a run that diverged is the worst."""
    return -1.0 if record["diverged"] else max(record["top1"], record["top1_ema"])


def collect(out: Path, plan: Plan, facts: dict[str, Any]) -> Report:
    """All records, and a summary of each row, the best first."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / RUNS).glob("*.json"))]
    tuning = [r for r in records if r["tuning"]]
    runs = [r for r in records if not r["tuning"]]
    speed = read(out / SPEED)
    rows = [_row(row, [r for r in runs if r["row"] == row], speed["rows"].get(row)) for row in ROWS]
    rows = [row for row in rows if row["seeds"] or row["speed"]]
    rows.sort(key=lambda row: -(row["top1_ema"] or {"mean": -1})["mean"])
    return {
        "date": time.strftime("%Y-%m-%d"), "plan": asdict(plan), "data": facts, "rows": rows, "runs": runs,
        "tuning": [{k: v for k, v in r.items() if k != "curve"} for r in tuning],
        "machine": speed["machine"], "resolutions": read(out / RESOLUTIONS),
    }  # fmt: skip


def _row(row: str, runs: list[dict[str, Any]], speed: dict[str, Any] | None) -> dict[str, Any]:
    whole = [r for r in runs if not r["diverged"]]
    found: dict[str, Any] = {
        "row": row, "about": ROWS[row], "seeds": [r["seed"] for r in whole], "diverged": len(runs) - len(whole),
        "parameters": runs[0]["parameters"] if runs else None, "speed": speed,
        "learning_rate": runs[0]["learning_rate"] if runs else None,
    }  # fmt: skip
    for name in ("top1", "top1_ema", "top5", "top5_ema"):
        values = [r[name] for r in whole]
        found[name] = _mean(values) if values else None
    return found


def _mean(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(report: Report) -> str:
    """For a terminal."""
    lines = [
        f"{'':14}{'parameters':>11}{'rate':>8}{'top-1':>15}{'averaged':>15}{'seeds':>6}{'pictures/s':>11}{'MB':>8}"
    ]
    for row in report["rows"]:
        speed = row["speed"] or {}
        rate, peak = speed.get("pictures_per_second_step"), speed.get("peak")
        parameters = f"{row['parameters']:,}" if row["parameters"] else "-"
        lines.append(
            f"{row['row']:14}{parameters:>11}{row['learning_rate'] or 0:>8g}{plus_minus(row['top1']):>15}"
            f"{plus_minus(row['top1_ema']):>15}{len(row['seeds']):>6}{f'{rate:,.0f}' if rate else '-':>11}"
            f"{f'{peak:,.0f}' if peak else '-':>8}"
        )
    return "\n".join(lines)


def plus_minus(value: dict[str, float] | None) -> str:
    """Mean and standard deviation in per cent."""
    return "-" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f}"


def write_json(report: Report, path: Path) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


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
