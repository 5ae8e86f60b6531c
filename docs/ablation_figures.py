"""Put the figures of ablations into docs/results.md, and their curves into docs/pictures.

    python docs/ablation_figures.py

Reads of results/ what is there of what `hydra-ssm ablate` wrote: ablation_small.json, and ablation.json,
ablation_unmatched.json and ablation_paper.json, whose figures stand beside the paper's; and what
`benchmarks/more_ablation.py` wrote.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from hydra_ssm.train.ablation.report import clock, draw, plus_minus

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results"
PAGE = DOCS / "results.md"
BEGIN, END = "<!-- figures: docs/ablation_figures.py writes what follows -->", "<!-- end of figures -->"
BESIDE = ("ablation", "ablation_unmatched", "ablation_paper")  # the paper, in this order
MORE = {"ablation_identity": "The same block with nothing mixed", "ablation_longer": "A few rows, three times as long"}
NONE = "-"
NO_TIMES = "Times a step are left out: on a CPU they are as much those of other programs as of the row."

Report = dict[str, Any]
# Of a row held-out loss, masked accuracy in %, GLUE average; None: not in the paper.
PAPER: dict[str, dict[str, tuple[float | None, float | None, float | None]]] = {
    "Table 2": {
        "dense-fixed": (2.05, 59.6, 74.7),
        "toeplitz-fixed": (1.97, 60.8, 75.8),
        "toeplitz": (1.91, 61.9, 77.7),
        "dft-fixed": (2.46, 53.1, 71.7),
        "vandermonde-fixed": (2.46, 53.0, 70.8),
        "vandermonde": (2.04, 59.7, 76.0),
        "cauchy-fixed": (2.25, 56.2, 74.2),
        "cauchy": (1.94, 61.6, 78.2),
        "low_rank-fixed": (2.06, 59.4, 74.9),
        "low_rank": (1.90, 62.2, 78.4),
        "attention-fixed": (2.08, 59.1, 71.9),
        "attention": (1.87, 62.9, 78.8),
        "quasiseparable-fixed": (2.03, 59.8, 75.1),
        "quasiseparable": (1.84, 63.3, 79.7),
        "quasiseparable_shared": (None, None, None),
    },
    "Table 3": {
        "semiseparable": (3.45, 39.5, 77.7),
        "add": (1.68, 65.6, 80.6),
        "mult": (1.72, 64.9, 79.6),
        "concat": (1.71, 65.4, 81.1),
        "quasiseparable": (1.66, 65.9, 81.7),
    },
    "Table 10": {
        "add": (None, None, 80.6),
        "add_diagonal": (None, None, 80.7),
        "add_shift": (None, None, 80.7),
        "quasiseparable": (None, None, 81.7),
    },
}
ABOUT = {
    "Table 2": "in the paper 12 layers, about 70M parameters, 24,000 steps of 4,096 x 128 tokens of C4",
    "Table 3": "in the paper the same models, 70,000 steps",
    "Table 10": "what a Hydra has beyond two scans that are added: a free diagonal, a shift, both",
}


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def beside_the_paper(title: str, ours: list[Report]) -> list[str]:
    """One of the paper's tables, and for each of our reports the same rows."""
    head = ["", "paper: loss", "accuracy", "GLUE"]
    for report in ours:
        head += [f"{heading(report)}: loss", "accuracy"]
    lines = [f"### {title}: {ABOUT[title]}", "", f"|{' | '.join(head)} |", "|" + "---|" * len(head)]
    for row, (loss, accuracy, glue) in PAPER[title].items():
        cells = [row, number(loss), number(accuracy, 1), number(glue, 1)]
        for report in ours:
            cells += result(report, row)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *order(title, ours)]


def heading(report: Report) -> str:
    """What tells our reports apart: the parameters of their models, and whether those are equal."""
    parameters = median(row["parameters"] for row in report["rows"])
    return f"{parameters / 1e6:.0f}M, {report['setting'].split(':')[0]}"


def result(report: Report, row: str) -> list[str]:
    """Loss and accuracy in a report, or that they are not there."""
    found = next((r for r in report["rows"] if r["row"] == row), None)
    if found is None:
        return [NONE, NONE]
    return [plus_minus(found["loss"], 1, ".3f"), plus_minus(found["accuracy"], 100, ".1f")]


def order(title: str, ours: list[Report]) -> list[str]:
    """Who is best, by loss: the paper's order and ours, of all rows, and of those alone that one of our reports has."""
    orders = {"paper": {row: loss for row, (loss, _, _) in PAPER[title].items() if loss is not None}}
    for report in ours:
        orders[heading(report)] = {r["row"]: r["loss"]["mean"] for r in report["rows"] if r["loss"]["mean"] is not None}
    paper, *own = orders.values()
    lines = []
    for rows in dict.fromkeys(tuple(row for row in paper if row in losses) for losses in own):
        if len(rows) > 1:
            which = f", of only the {len(rows)} rows that were run in all of these" if len(rows) < len(paper) else ""
            lines += [f"By loss, the best first{which}:", ""]
            for name, losses in orders.items():
                if losses.keys() >= set(rows):
                    lines.append(f"- {name}: {', '.join(sorted(rows, key=losses.__getitem__))}")
            lines.append("")
    return lines


def on_gpus(report: Report) -> bool:
    """Whether times are those of the rows: steps that a GPU replays. On a CPU they are those of all that it does."""
    return any(run["graph"] for run in report["runs"])


def all_rows(report: Report) -> list[str]:
    """Every row of a report, the best first; times a step where they were measured on GPUs."""
    plan, data = report["plan"], report["data"]
    baseline, timed = data["baseline"], on_gpus(report)
    setting = report["setting"][0].upper() + report["setting"][1:]
    about = (
        f"`{report['command']}`, {report['date']}. **{setting}.** {plan['layers']} layers of width {plan['d_model']}, "
        f"{plan['steps']:,} steps of {plan['batch_size']} x {plan['length']} tokens, {data['train_rows']:,} rows of "
        f"text to train on, {data['held_out_rows']:,} held out. Means and standard deviations over the seeds. "
        + (f"Times {clock(report)}." if timed else NO_TIMES)
    )
    lines = [
        textwrap.fill(about, 120, break_long_words=False, break_on_hyphens=False), "",
        f"| row | N | parameters | held-out loss | accuracy, % | {'ms a step | ' * timed}seeds |",
        f"|---|---|---|---|---|{'---|' * timed}---|",
    ]  # fmt: skip
    for row in report["rows"]:
        cells = [
            row["row"], str(row["state"] or NONE), f"{row['parameters']:,}", *result(report, row["row"]),
            *([plus_minus(row["seconds_a_step"], 1000, ".1f")] if timed else []),
            str(len(row["seeds"])) + (f", {len(row['diverged'])} diverged" if row["diverged"] else ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        f"| word frequencies alone | | | {baseline['loss']:.3f} | {100 * baseline['accuracy']:.1f} | {'| ' * timed}|"
    )
    return [*lines, ""]


def read(name: str) -> Report | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def picture(report: Report, name: str) -> list[str]:
    """Draws it, and says where."""
    draw(report, DOCS / "pictures" / f"{name}.png")
    return [f"![held-out loss by step of every row, {report['setting']}](pictures/{name}.png)", ""]


def main() -> None:
    ours = {name: report for name in BESIDE if (report := read(name)) is not None}
    lines = ["## Beside the paper", ""]
    if not ours:
        lines += ["Ours have not been run yet at a size that could stand beside them.", ""]
    for title in PAPER:
        lines += beside_the_paper(title, [*ours.values()])
    for name, report in ours.items():
        lines += [f"## The rows of {report['plan']['size']} size, {'un' * report['plan']['unmatched']}matched", ""]
        lines += [*all_rows(report), *picture(report, name)]
    for name, title in MORE.items():
        report = read(name)
        if report is not None:
            lines += [f"## {title}", "", *all_rows(report)]
    small = read("ablation_small")
    if small is not None:
        lines += ["## The small comparison", "", *all_rows(small), *picture(small, "ablation_small")]
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, END + after]), encoding="utf-8")


if __name__ == "__main__":
    main()
