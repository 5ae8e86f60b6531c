"""The paper's table from the records of the runs: a mean over seeds and its spread for each task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..records import Record, read_records
from .run import RUNS, Plan
from .tasks import PAPER, TASKS

AVERAGE = "average"


def collect(out: Path, plan: Plan, absent: list[str]) -> dict[str, Any]:
    """All that is known: settings, every run, means and spreads in per cent. Without infinities, as JSON has none."""
    runs = read_records(out / RUNS)
    runs.sort(key=lambda run: (list(TASKS).index(run["task"]), run["seed"]))
    tasks: dict[str, Any] = {}
    for name in TASKS:
        own = [run for run in runs if run["task"] == name and "score" in run]
        if own:
            values = {metric: [run["scores"][metric] for run in own] for metric in own[0]["scores"]}
            tasks[name] = {
                **_summary([run["score"] for run in own]),
                "seeds": [run["seed"] for run in own],
                "metrics": {metric: _summary(found) for metric, found in values.items()},
            }
    return {
        "plan": asdict(plan), "absent": absent, "tasks": tasks, AVERAGE: _average(runs, list(tasks)), "runs": runs,
    }  # fmt: skip


def _summary(values: list[float]) -> dict[str, float | None]:
    """In per cent: the mean, and the standard deviation of one value (n - 1), None for fewer than two."""
    return {"mean": 100 * mean(values), "spread": 100 * stdev(values) if len(values) > 1 else None}


def _average(runs: list[Record], tasks: list[str]) -> dict[str, Any] | None:
    """Over the tasks, of each seed that has all of them; its spread is that of these averages."""
    scores = {(run["task"], run["seed"]): run["score"] for run in runs if "score" in run}
    seeds = sorted({seed for _, seed in scores})
    whole = [[scores[name, seed] for name in tasks] for seed in seeds if all((name, seed) in scores for name in tasks)]
    return {**_summary([mean(found) for found in whole]), "tasks": len(tasks)} if whole else None


def table(report: dict[str, Any]) -> str:
    """The paper's table with this model in it, and below it every metric."""
    found, average = report["tasks"], report[AVERAGE]
    count = f"{AVERAGE} of {average['tasks']}" if average and average["tasks"] < len(TASKS) else AVERAGE
    rows = [["", *TASKS, count]]
    rows += [[Path(report["plan"]["model"]).name, *(_cell(found.get(name)) for name in TASKS), _cell(average)]]
    rows += [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER.items()]
    lines = [_aligned(rows), "", *(_metrics(name, found[name]) for name in found)]
    diverged = [
        f"{run['task']}, seed {run['seed']}: diverged {run['diverged']}" for run in report["runs"] if "diverged" in run
    ]
    note = (
        "mean over seeds ± standard deviation, in per cent; QQP and MRPC are the mean of accuracy and F1, MNLI that of "
        "both parts"
    )
    return "\n".join([*lines, *diverged, note])


def _cell(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "-"
    spread = summary["spread"]
    return f"{summary['mean']:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _metrics(name: str, task: dict[str, Any]) -> str:
    values = ", ".join(f"{metric.replace('_', ' ')} {_cell(value)}" for metric, value in task["metrics"].items())
    return f"{name:6} {values}; seeds {', '.join(map(str, task['seeds']))}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
