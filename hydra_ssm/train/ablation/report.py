"""What an ablation has found so far: a table, JSON with all curves, CSV, and a picture of the curves."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..._extras import require
from ..checkpoints import whole_file
from ..plans import read_plan
from ..records import Record
from .data import Data
from .models import REFERENCE
from .plan import Plan
from .run import DATA, Key, finished, steps_done

MEANING = (
    "means and standard deviations over the seeds; loss (nats) and accuracy of the same hidden tokens of held-out text"
)
HEADER = f"{'':29}{'state':>5}{'parameters':>13}{'held-out loss':>16}{'accuracy, %':>14}{'ms a step':>16}{'seeds':>7}"
FIELDS = (
    "setting", "row", "matrix", "data_dependent", "state", "parameters", "seed", "loss", "accuracy", "seconds_a_step",
    "at_once", "device", "diverged",
)  # fmt: skip
MEASURES = ("loss", "accuracy", "seconds_a_step")
ONE_WAY = ("semiseparable", "add", "add_diagonal", "add_shift", "mult", "concat")  # and what is made of two of them


def collect(out: Path, keys: Sequence[Key], command: str) -> dict[str, Any]:
    """All that is known of these runs, as JSON has it."""
    plan, data = read_plan(Plan, out), Data(out / DATA)
    records = {key: finished(out, key) for key in keys}
    found = [record for record in records.values() if record is not None]
    rows = list(dict.fromkeys(record["row"] for record in found))
    return {
        "command": command, "date": date.today().isoformat(), "setting": plan.setting, "meaning": MEANING,
        "plan": asdict(plan), "data": data.facts,
        "rows": sorted((_row([r for r in found if r["row"] == row]) for row in rows), key=_by_loss),
        "unfinished": [
            {**key._asdict(), "steps_kept": steps_done(out, key)} for key, record in records.items() if record is None
        ],
        "runs": found,
    }  # fmt: skip


def _row(records: list[Record]) -> dict[str, Any]:
    """Of the runs of a row."""
    ended = [record for record in records if "diverged" not in record]
    first = {name: records[0][name] for name in ("row", "matrix", "data_dependent", "state", "heads", "parameters")}
    return {
        **first,
        "seeds": [record["seed"] for record in ended],
        "diverged": [record["seed"] for record in records if "diverged" in record],
        **{name: _statistics([record[name] for record in ended]) for name in MEASURES},
    }


def _statistics(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": mean(values) if values else None,
        "spread": stdev(values) if len(values) > 1 else None,
    }


def _by_loss(row: dict[str, Any]) -> float:
    return float("inf") if row["loss"]["mean"] is None else row["loss"]["mean"]


def table(report: dict[str, Any]) -> str:
    """The rows, best first, with what they have in common."""
    plan, data = report["plan"], report["data"]
    baseline = data["baseline"]
    lines = [
        f"{report['setting']}",
        f"{plan['layers']} layers of width {plan['d_model']}, {plan['steps']:,} steps of {plan['batch_size']} x "
        f"{plan['length']} tokens, the same for all",
        HEADER,
        *map(_line, report["rows"]),
        f"{'word frequencies alone':29}{'':18}{baseline['loss']:>8.3f}{'':8}{100 * baseline['accuracy']:>6.1f}",
        report["meaning"],
    ]
    if report["runs"]:
        lines.append(f"ms a step {clock(report)}")
    if report["unfinished"]:
        lines.append(_rest(report))
    return "\n".join(lines)


def clock(report: dict[str, Any]) -> str:
    """What the times were measured on."""
    devices = sorted({run["device"] for run in report["runs"]})
    at_once = sorted({run["at_once"] for run in report["runs"]})
    shared = " or ".join(map(str, at_once))
    return f"on {'; '.join(devices)}" + (f", {shared} runs at once, which slow each other" if at_once != [1] else "")


def _line(row: dict[str, Any]) -> str:
    values = {name: row[name] for name in MEASURES}
    cells = [
        f"{plus_minus(values['loss'], 1, '.3f'):>16}",
        f"{plus_minus(values['accuracy'], 100, '.1f'):>14}",
        f"{plus_minus(values['seconds_a_step'], 1000, '.1f'):>16}",
    ]
    last = f"{len(row['seeds']):>7}" + (f", {len(row['diverged'])} diverged" if row["diverged"] else "")
    return f"{row['row']:29}{row['state'] or '-':>5}{row['parameters']:>13,}{''.join(cells)}{last}"


def plus_minus(value: dict[str, float | None], scale: float, form: str) -> str:
    """A mean and its spread, where they are known."""
    if value["mean"] is None:
        return "-"
    spread = "" if value["spread"] is None else f" ± {scale * value['spread']:{form}}"
    return f"{scale * value['mean']:{form}}{spread}"


def _rest(report: dict[str, Any]) -> str:
    rest = report["unfinished"]
    runs = len(rest) + len(report["runs"])
    begun = [f"{run['row']}, seed {run['seed']}, at step {run['steps_kept']:,}" for run in rest if run["steps_kept"]]
    after = f" ({'; '.join(begun)})" if begun else ""
    return f"{len(report['runs'])} of {runs} runs are finished{after}: the same command goes on"


def write_csv(report: dict[str, Any], path: Path) -> None:
    """A line a run, without its curves."""
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({"setting": report["setting"], **run} for run in report["runs"])


def draw(report: dict[str, Any], path: Path) -> None:
    """Held-out loss by step, mean and range over the seeds; a panel for each form, and one for the scans."""
    # Without pyplot: no display, no global state.
    figure = require("matplotlib.figure", "train").Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    runs = [run for run in report["runs"] if "diverged" not in run]
    for ax, (title, belongs) in zip(axes, PANELS.items(), strict=True):
        baseline = report["data"]["baseline"]["loss"]
        ax.axhline(baseline, color="grey", linestyle=":", label=f"word frequencies alone  {baseline:.3f}")
        _panel(ax, [run for run in runs if belongs(run)], _colors(runs))
        ax.set(title=title, xlabel="step")
    axes[0].set_ylabel("held-out loss (nats)")
    figure.suptitle(f"{report['plan']['size']} ablation, {report['setting']}", fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part, dpi=90, format="png", pil_kwargs={"optimize": True})


PANELS: dict[str, Callable[[Record], bool]] = {
    "data dependent": lambda run: run["data_dependent"] and run["matrix"] not in ONE_WAY,
    "fixed": lambda run: not run["data_dependent"] and run["matrix"] not in ONE_WAY,
    "one scan, and two combined": lambda run: run["matrix"] in ONE_WAY or run["row"] == REFERENCE,
}


def _colors(runs: list[Record]) -> dict[str, str]:
    """Of each matrix class, the same in all panels."""
    matrices = dict.fromkeys(run["matrix"] for run in runs)
    groups = [name for name in matrices if name not in ONE_WAY], [name for name in matrices if name in ONE_WAY]
    colors = {name: f"C{number % 10}" for group in groups for number, name in enumerate(group)}
    return colors | {REFERENCE: "black"}  # which is in two panels


def _panel(ax: Any, runs: list[Record], colors: dict[str, str]) -> None:
    by_row: dict[str, list[Record]] = {}
    for run in runs:
        by_row.setdefault(run["row"], []).append(run)
    ends = {row: mean(run["loss"] for run in own) for row, own in by_row.items()}
    for row in sorted(by_row, key=lambda row: ends[row]):  # the legend has the best first
        first = by_row[row][0]
        points = list(zip(*(run["held_out"]["loss"] for run in by_row[row]), strict=True))
        style = "--" if first["matrix"] in ONE_WAY and not first["data_dependent"] else "-"
        step, color = first["held_out"]["step"], colors[first["matrix"]]
        ax.plot(step, [mean(p) for p in points], style, color=color, label=f"{row}  {ends[row]:.3f}", linewidth=1.2)
        ax.fill_between(step, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.1, linewidth=0)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
