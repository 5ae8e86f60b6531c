"""Put a GPU's figures into docs/performance.md: tables and pictures/speed.png, from what was measured there.

    python docs/speed_figures.py benchmarks/gpu/results/speed.json benchmarks/gpu/results/accuracy.json

The former is what `hydra-ssm bench --encoder --json` wrote, the latter (it may be missing) benchmarks/gpu/accuracy.py.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from hydra_ssm.bench.report import Row, draw

PAGE = Path(__file__).parent / "performance.md"
BEGIN, END = "<!-- figures: docs/speed_figures.py writes what follows -->", "<!-- end of figures -->"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def layers(rows: list[Row], title: str) -> list[str]:
    """A line a row, with both clocks."""
    lines = [
        f"**{title}**", "",
        "| | batch x length | forward, replayed | step, replayed | forward, Python | step, Python | MB | of ceilings |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        times = (r.graph_forward, r.graph_step, r.forward, r.step)
        cells = [r.note] * 4 if r.note else [milliseconds(t) for t in times]
        peak = "-" if r.peak is None else f"{r.peak:,.0f}"
        fractions = [r.forward_of_ceilings, r.step_of_ceilings]
        of = ", ".join("-" if f is None else f"{f:.2f}" for f in fractions)
        lines.append(f"| {r.name} | {r.batch} x {r.length:,} | {' | '.join(cells)} | {peak} | {of} |")
    return [*lines, ""]


def stacks(rows: list[Row]) -> list[str]:
    """A line a length, a column an encoder."""
    names = list(dict.fromkeys(row.name for row in rows))
    lines = [
        "**Encoders**, a step on the same number of tokens at every length, milliseconds replayed (compiled where the "
        "row says so)", "",
        f"| batch x length | {' | '.join(names)} |", "|---|" + "---|" * len(names),
    ]  # fmt: skip
    by_shape: dict[tuple[int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_shape[row.batch, row.length][row.name] = row
    for (batch, length), found in by_shape.items():
        cells = [
            "-"
            if row is None
            else row.note or f"{milliseconds(row.best_step)}{'' if row.compiled else ', not compiled'}"
            for row in map(found.get, names)
        ]
        lines.append(f"| {batch} x {length:,} | {' | '.join(cells)} |")
    return [*lines, ""]


def small(rows: list[Row]) -> list[str]:
    """One sentence."""
    ours, theirs = rows
    a, b = (r.graph_forward or r.forward or 0.0 for r in rows)
    return [
        f"**Small layers** (width 256, {ours.batch} x {ours.length}, forward): {ours.name} {1e3 * a:.0f} µs, "
        f"{theirs.name} {1e3 * b:.0f} µs replayed: {a / b:.2f} times.", ""
    ]  # fmt: skip


def accuracy(report: dict[str, Any]) -> list[str]:
    """The worst of each dtype."""
    found = [row for row in report["rows"] if "errors" in row]
    beyond = [
        {name for name, (error, _) in row["errors"].items() if error > 1e-2}
        for row in found
        if row["case"]["dtype"] == "bfloat16"
    ]
    lines = [
        f"**Errors** against float64 (`{report['command']}`, {report['date']}): of {len(report['rows'])} cases "
        f"{len(report['rows']) - len(found)} did not end in time and {sum(not row['ok'] for row in found)} are over "
        "the bar: more than twice as far off as the eager form (and half a unit in the last place; of several draws "
        "the root mean square), or beyond 1e-2 in bfloat16 where the eager form is not. Beyond 1e-2 at all are "
        f"{sum(map(bool, beyond))} of {len(beyond)} cases in bfloat16, in gradients of "
        f"{', '.join(sorted(set().union(*beyond)))}. Largest relative error over all cases, in brackets that of the "
        "eager form in the same case:", "",
        "| dtype | cases | output | any gradient | A_log, dt_bias of layers |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for dtype in dict.fromkeys(row["case"]["dtype"] for row in report["rows"]):
        rows = [row["errors"] for row in report["rows"] if row["case"]["dtype"] == dtype and "errors" in row]
        cells = []
        for wanted in (lambda n: n == "y", lambda n: n != "y", lambda n: n in ("A_log", "dt_bias")):
            pairs = [pair for errors in rows for name, pair in errors.items() if wanted(name)]
            pairs = [pair for pair in pairs if pair != [1.0, 1.0]]  # a truth that no number of this size can hold
            cells.append("{:.1e} ({:.1e})".format(*max(pairs)) if pairs else "-")
        lines.append(f"| {dtype} | {len(rows)} | {' | '.join(cells)} |")
    return [*lines, ""]


def figures(report: dict[str, Any], exactness: dict[str, Any] | None) -> str:
    """All of it, in Markdown."""
    machine = ", ".join(str(v) if k == "device" else f"{k} {v}" for k, v in report["machine"].items())
    ceilings = report["ceilings"]
    lines = [
        f"`{report['command']}`, {report['date']}; {machine}. Ceilings measured in the same run: "
        f"{ceilings['copy'] / 1e12:.2f} TB/s, {ceilings['matmul'] / 1e12:.0f} TFLOP/s.", "",
        "![time per token against length](pictures/speed.png)", "",
    ]  # fmt: skip
    sizes = f"width {report['settings']['d_model']}, {report['settings']['dtype']}"
    lines += layers([Row(**r) for r in report["layers"]], f"Layers, {sizes}, milliseconds")
    lines += layers([Row(**r) for r in report["products"]], "The product alone, milliseconds")
    if "encoders" in report:
        lines += stacks([Row(**r) for r in report["encoders"]])
    if "small" in report:
        lines += small([Row(**r) for r in report["small"]])
    return "\n".join(lines + (accuracy(exactness) if exactness else []))


def main(speed: str, exactness: str | None = None) -> None:
    report = json.loads(Path(speed).read_text(encoding="utf-8"))
    known = json.loads(Path(exactness).read_text(encoding="utf-8")) if exactness else None
    title = f"{report['machine']['device']}, {report['settings']['dtype']}"
    draw(PAGE.parent / "pictures" / "speed.png", [Row(**r) for r in report["layers"]], title)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures(report, known)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
