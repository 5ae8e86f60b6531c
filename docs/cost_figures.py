"""Put measured costs into docs/matrices.md: a table for each file that `hydra-ssm bench --matrices --json` wrote.

python docs/cost_figures.py [FILE ...], by default those of results/: tables of files that are not named go.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hydra_ssm.bench.growth import SLACK, Growth, Point

PAGE = Path(__file__).parent / "matrices.md"
KEPT = [PAGE.parent.parent / "results" / f"matrices-{device}.json" for device in ("cpu", "gpu")]
BEGIN, END = "<!-- costs: docs/cost_figures.py writes what follows -->", "<!-- end of costs -->"


def main(*files: str) -> None:
    lines = [line for file in files or KEPT for line in table(json.loads(Path(file).read_text(encoding="utf-8")))]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")


def table(report: dict[str, Any]) -> list[str]:
    """A line a class: its longest length, time, memory, and exponents."""
    sizes, machine = report["settings"], report["machine"]
    versions = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "device")
    shape = f"{sizes['heads']} heads of {sizes['headdim']}, order {sizes['order']}, {sizes['dtype']}"
    columns = ("class", "up to L", "forward, ms", "step, ms", "step, MB")
    columns += ("time: promised", "measured", "memory: promised", "measured")
    lines = [
        f"`{report['command']}`, {report['date']}, {machine['device']}, {versions}; one sequence, {shape}"
        f"{'; again ' + report['again'] if 'again' in report else ''}:", "",
        f"| {' | '.join(columns)} |", "|---" * len(columns) + "|",
    ]  # fmt: skip
    longest = {p["name"]: Point(**p) for p in report["points"]}  # the last of each
    for found in report["growth"]:
        growth = Growth(**{name: value for name, value in found.items() if name != "kept"})
        p = longest[growth.name]
        time, memory = marked(growth.time, growth.promised_time), marked(growth.memory, growth.promised_memory)
        peak = "-" if p.peak is None else f"{p.peak:,.0f}"
        lines.append(
            f"| [{p.name}](#{p.name}) | {p.length:,} | {p.forward:,.1f} | {p.step:,.1f} | {peak} "
            f"| {growth.law}: {growth.promised_time:.2f} | {time} | {growth.promised_memory:.2f} | {memory} |"
        )
    return [*lines, ""]


def marked(found: float | None, promised: float) -> str:
    """Bold where the promise is broken."""
    if found is None:
        return "-"
    return f"{found:.2f}" if found <= promised + SLACK else f"**{found:.2f}**"


if __name__ == "__main__":
    main(*sys.argv[1:])
