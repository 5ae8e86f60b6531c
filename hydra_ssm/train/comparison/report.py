"""What came out of a comparison: one JSON, a table, and the curves."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import mean, mode, stdev
from typing import Any

from ..._extras import require
from ..checkpoints import whole_file
from ..errors import UserError
from ..plans import NAME, check_plan, read_plan, write_plan
from ..records import read_json, write_json
from .baseline import without_context
from .data import Data
from .plan import MODELS, TEXTS, Plan
from .run import RUNS, all_finished, finished, mean_of_parts
from .tasks import FOLDER, REPORT, are_whole
from .tuning import edges

Report = dict[str, Any]
MARK = "†"  # of a time that does not compare


def collect(out: Path, plan: Plan, data: Data, left: list[str]) -> Report:
    """All that is known. `left` names what is not finished."""
    runs = all_finished(out)
    glue: dict[str, Any] = {}
    for model in MODELS:
        if found := read_json(out / FOLDER / model / REPORT):
            glue[model] = {name: found[name] for name in ("tasks", "average", "runs")}
    return {
        "date": date.today().isoformat(), "plan": asdict(plan), "data": data.facts, "unfinished": left,
        "without_context": {text: without_context(data, text, plan.length) for text in TEXTS},
        "summary": [
            {"stage": stage, "model": model, "length": length, **_summary(own)}
            for (stage, model, length), own in _grouped(runs).items()
        ],
        "glue": glue, "runs": runs,
    }  # fmt: skip


def take_over(source: Path, out: Path, data: Report) -> None:
    """Put into the folder what such a JSON tells of, but for what is there: plan, runs, and tasks that are whole.

    Raises UserError where it is none, of other data, or of another plan than the folder has.
    """
    if not source.is_file():
        raise UserError(f"{source} is not there")
    found = read_json(source)
    try:
        plan, texts, runs = Plan.of(found["plan"]), found["data"]["texts"], {run["name"]: run for run in found["runs"]}
        whole = {model: tasks for model, tasks in found["glue"].items() if are_whole(tasks, plan)}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{source} must be the comparison.json of a comparison, it lacks {error}") from error
    if texts != data["texts"]:
        raise UserError(f"{source} must be of the same data, it is of {texts}, here are {data['texts']}")
    if not (out / NAME).exists():
        write_plan(plan, out)
    check_plan(read_plan(Plan, out), asdict(plan), f"the comparison in {out}")
    for name, run in runs.items():
        if finished(out, Path(name).name) is None:
            write_json(out / RUNS / f"{Path(name).name}.json", run)
    for model in MODELS:
        if model in whole and not (out / FOLDER / model).exists():
            write_json(out / FOLDER / model / REPORT, whole[model])


def _grouped(runs: list[Report]) -> dict[tuple[str, str, int], list[Report]]:
    """Runs that differ in their seeds alone, rates apart."""
    groups: dict[tuple[str, str, int], list[Report]] = {}
    for run in runs:
        if run["stage"] != "rate" and "diverged" not in run:
            groups.setdefault((run["stage"], run["model"], run["length"]), []).append(run)
    return groups


def elsewhere(report: Report) -> dict[str, list[str]]:
    """Runs that were not computed on the device of most, and on which they were: their seconds do not compare."""
    known = {run["name"]: run["devices"] for run in report["runs"] if "devices" in run}
    usual = mode(map(tuple, known.values())) if known else ()
    return {name: devices for name, devices in known.items() if len(devices) > 1 or tuple(devices) != usual}


def differences(report: Report) -> list[Report]:
    """Hydra's loss minus BERT's where both have the same tokens and seed, with the standard error of that."""
    by_run = {(r["stage"], r["length"], r["seed"], r["model"]): r for r in report["runs"] if "parts" in r}
    found = []
    for (stage, length, seed, model), run in by_run.items():
        other = by_run.get((stage, length, seed, MODELS[1]))
        if stage not in ("tokens", "length") or model != MODELS[0] or other is None:
            continue
        texts = {
            text: mean_of_parts([(a - b, n) for (a, n), (b, _) in zip(*pair, strict=True)])
            for text, pair in ((text, (run["parts"][text], other["parts"][text])) for text in TEXTS)
        }
        found.append({"stage": stage, "length": length, "seed": seed, **texts})
    return sorted(found, key=lambda d: (d["stage"] != "tokens", d["length"], d["seed"]))


def _summary(runs: list[Report]) -> Report:
    """Means over the seeds, and standard deviations (n - 1) where there are several."""
    values = {
        **{f"{text}_loss": [run["losses"][text] for run in runs] for text in TEXTS},
        **{f"{text}_accuracy": [run["accuracies"][text] for run in runs] for text in TEXTS},
        **{name: [run[name] for run in runs] for name in ("seconds", "tokens_per_second", "tokens")},
    }
    return {
        "seeds": [run["seed"] for run in runs], **{name: runs[0][name] for name in ("parameters", "norm", "rate")},
        **{f"{text}_error": max(r["errors"][text] or 0.0 for r in runs) or None for text in TEXTS},
        **{
            name: {"mean": mean(found), "spread": stdev(found) if len(found) > 1 else None}
            for name, found in values.items()
        },
    }  # fmt: skip


def table(report: Report) -> str:
    """What is known, in lines of text."""
    lines = [
        f"{'':26}{'length':>7}{'norm':>6}{'rate':>9}{'books loss':>14}{'acc. %':>8}{'wikitext':>14}{'acc. %':>8}"
        f"{'tokens/s':>12}"
    ]
    others = elsewhere(report)
    for run in report["runs"]:
        if "diverged" in run:
            lines.append(f"{_begin(run)}  diverged {run['diverged']}")
            continue
        cells = "".join(
            f"{_with_error(run['losses'][text], run['errors'][text]):>14}{100 * run['accuracies'][text]:>8.1f}"
            for text in TEXTS
        )
        speed = f"{run['tokens_per_second']:>12,.0f}{MARK * (run['name'] in others)}"
        lines.append(f"{_begin(run)}{cells}{speed}")
    lines += ["losses are of all held-out text, ± their standard error"] if report["runs"] else []
    for what in report["without_context"][TEXTS[0]]:
        both = ", ".join(f"{text} {report['without_context'][text][what]:.3f}" for text in TEXTS)
        lines.append(f"without context, from {what}: loss {both}")
    for found in differences(report):
        both = ", ".join(f"{text} {_with_error(*found[text])}" for text in TEXTS)
        lines.append(f"hydra - bert, {found['stage']}, length {found['length']}, seed {found['seed']}: loss {both}")
    lines += edges(Plan.of(report["plan"]), report["runs"])
    lines += [f"{MARK} not on the device of most: {name} on {', then '.join(on)}" for name, on in others.items()]
    for model, found in report["glue"].items():
        scores = [f"{task} {_percent(value)}" for task, value in found["tasks"].items()]
        lines.append(f"GLUE, {model}: {', '.join(scores)}; average {_percent(found['average'])}")
    if report["unfinished"]:
        lines.append(f"not finished: {', '.join(report['unfinished'])}; the same command goes on")
    return "\n".join(lines)


def _begin(run: Report) -> str:
    return f"{run['name']:26}{run['length']:>7}{run['norm']:>6}{run['rate']:>9.1e}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _percent(summary: Report | None) -> str:
    if summary is None:
        return "-"
    return f"{summary['mean']:.1f}" + ("" if summary["spread"] is None else f" ± {summary['spread']:.1f}")


CLOCKS = {"tokens": 1e6, "seconds": 1.0}
LOOK = {"hydra": {"color": "C0", "marker": "o"}, "bert": {"color": "C1", "marker": "s"}}


def draw_curves(report: Report, path: Path) -> None:
    """Held-out loss by tokens and by seconds, of each text."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for row, text in zip(axes, TEXTS, strict=True):
        for ax, (by, unit) in zip(row, CLOCKS.items(), strict=True):
            for run in (r for r in report["runs"] if r["stage"] in ("tokens", "seconds") and "diverged" not in r):
                if run["stage"] == "seconds" and by == "tokens":
                    continue
                points = [p for p in run["curve"] if p["step"]]
                first = run["seed"] == report["plan"]["seeds"][0]
                label = f"{run['model']}{', on as many seconds' * (run['stage'] == 'seconds')}" if first else None
                style = "--" if run["stage"] == "seconds" else "-"
                y = [p[f"{text}_loss"] for p in points]
                ax.plot([p[by] / unit for p in points], y, style, label=label, markersize=3, **LOOK[run["model"]])
            ax.set(xlabel=f"{'million ' * (unit > 1)}{by} of training", title=text)
        row[0].set_ylabel("held-out loss (nats)")
        row[1].legend(frameon=False)
    _save(figure, path)


def draw_lengths(report: Report, path: Path) -> None:
    """Loss and speed by the length of the rows."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for model in MODELS:
        own = [s for s in report["summary"] if s["stage"] == "length" and s["model"] == model]
        own.sort(key=lambda s: s["length"])
        names = [*(f"{text}_loss" for text in TEXTS), "tokens_per_second"]
        for ax, name in zip(axes, names, strict=True):
            ax.plot([s["length"] for s in own], [s[name]["mean"] for s in own], label=model, **LOOK[model])
            ax.set(xscale="log", xlabel="length of the rows", title=name.replace("_", " "))
            ax.set_xticks(lengths := report["plan"]["lengths"], [f"{n:,}" for n in lengths], minor=False)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as part:
        figure.savefig(part, dpi=100, format="png", pil_kwargs={"optimize": True})
