"""Put the figures of the comparison of image models into docs/results.md, and its curves into docs/pictures.

    python docs/image_figures.py

Reads results/images.json, which `hydra_ssm.train.image.comparison.compare` wrote as images.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra_ssm.train.image.comparison.report import (
    EDGE,
    MARKS,
    PYTHON,
    draw,
    from_python,
    lead,
    learning_rate,
    plus_minus,
    seeds,
)

DOCS = Path(__file__).parent
FILE = DOCS.parent / "results" / "images.json"
PAGE = DOCS / "results.md"
BEGIN, END = "<!-- figures: docs/image_figures.py writes what follows -->", "<!-- end of the figures of images -->"
NONE = "-"

Report = dict[str, Any]


def models(report: Report) -> list[str]:
    """A line a row, the best first."""
    plan, data, machine = report["plan"], report["data"], report["machine"]
    on_gpu = any((row["speed"] or {}).get("device") == "cuda" for row in report["rows"])
    how = ", replayed as a CUDA graph where there is one), bf16 autocast." if on_gpu else "), float32."
    lines = [
        f"{report['date']}, {machine.get('device', 'device not measured')}, torch {machine.get('torch', NONE)}; "
        f"{data['source']}: {data['train_pictures']:,} pictures to train on, {data['test_pictures']:,} to test, "
        f"{data['size']} pixels in patches of {plan['patch']}. {plan['epochs']} epochs of {plan['batch_size']:,} "
        f"pictures a step, AdamW, weight decay {plan['weight_decay']:g}, drop-path {plan['drop_path']:g}, learning "
        f"rate by {plan['tuning_epochs']} epochs on nine tenths of the training pictures, the best of "
        f"{', '.join(f'{rate:g}' for rate in plan['learning_rates'])} on the last tenth, and beyond, where that is the "
        f"first or the last, at most {plan['further_rates']} times by a factor of two. "
        f"{augmentation(plan['strength'])} "
        "Top-1 in per cent, mean ± standard deviation over the seeds; pictures a second and memory of a training "
        f"step (forward and backward{how}",
        "",
        "| | parameters | learning rate | top-1, averaged | top-1, raw | top-5, averaged | pictures/s | MB | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        speed = row["speed"] or {}
        cells = [
            row["row"], number(row["parameters"]), learning_rate(row), plus_minus(row["top1_ema"]),
            plus_minus(row["top1"]), plus_minus(row["top5_ema"]),
            number(speed.get("pictures_per_second_step")) + (PYTHON if from_python(row) else ""),
            number(speed.get("peak")), seeds(row),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    marks = {EDGE: any(r["rate_at_edge"] for r in report["rows"]), PYTHON: any(map(from_python, report["rows"]))}
    told = [f"`{mark}` {MARKS[mark]}." for mark, there in marks.items() if there]
    told += [f"Failed: {name} ({' '.join(lines)})." for name, lines in report["failed"].items()]
    told = [*(f"{line}." for line in lead(report)), *told]
    return [*lines, "", *told, *([""] if told else []), *(f"- `{r['row']}`: {r['about']}" for r in report["rows"]), ""]


def augmentation(strength: dict[str, Any]) -> str:
    """In words."""
    parts = [f"crops of ±{strength['crop']} pixels, mirroring"]
    parts += ["RandAugment 9/0.5 (two operations of thirteen)"] if strength["randaugment"] else []
    parts += [f"mixup 0.8 or cutmix 1.0 of {strength['mix']:.0%} of the pictures"] if strength["mix"] else []
    parts += [f"random erasing {strength['erase']:g}"] if strength["erase"] else []
    return f"Augmentation: {', '.join(parts)}; label smoothing {strength['smoothing']:g}."


def tried(report: Report) -> list[str]:
    """What the learning rates gave."""
    rates = sorted({r["learning_rate"] for r in report["tuning"]})
    if not report["tuning"]:
        return []
    lines = ["Top-1 on the last tenth by learning rate, the better of averaged and raw weights:", ""]
    lines += [f"| | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---|" * len(rates)]
    for row in report["rows"]:
        found = {r["learning_rate"]: r for r in report["tuning"] if r["row"] == row["row"]}
        lines.append(f"| {row['row']} | {' | '.join(outcome(found.get(rate)) for rate in rates)} |")
    return [*lines, ""]


def outcome(record: dict[str, Any] | None) -> str:
    if record is None:
        return NONE
    return "diverged" if record["diverged"] else f"{max(record['top1'], record['top1_ema']):.2f}"


def resolutions(report: Report) -> list[str]:
    """Pictures a second and memory by resolution, base models beside each other."""
    rows = report["resolutions"]["rows"]
    if not rows:
        return []
    names = list(dict.fromkeys(key.rpartition(" ")[0] for key in rows))
    lines = ["**Base models by resolution**, as many pictures as have 16,384 tokens together:", ""]
    heads = " | ".join(f"{name}: forward, pictures/s | step, pictures/s | MB of a step" for name in names)
    lines += [
        f"| pixels | tokens | {heads} |",
        "|---|---|" + "---|---|---|" * len(names),
    ]
    for pixels in sorted({row["pixels"] for row in rows.values()}):
        cells, tokens = [], NONE
        for name in names:
            row = rows.get(f"{name} {pixels}", {})
            tokens = f"{row['length']:,}" if row else tokens
            note = row.get("note")
            keys = ("pictures_per_second_forward", "pictures_per_second_step", "peak")
            cells += [note, NONE, NONE] if note else [number(row.get(key)) for key in keys]
        lines.append(f"| {pixels} | {tokens} | {' | '.join(cells)} |")
    return [*lines, ""]


def number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def main() -> None:
    if FILE.exists():
        report = json.loads(FILE.read_text(encoding="utf-8"))
        lines = [*models(report), *tried(report), *resolutions(report)]
        if report["runs"]:
            draw(report, DOCS / "pictures" / "images.png")
            lines += ["![top-1 by epoch of every row](pictures/images.png)", ""]
    else:
        lines = ["The comparison has not been run yet.", ""]
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, END + rest.split(END)[1]]), encoding="utf-8")


if __name__ == "__main__":
    main()
