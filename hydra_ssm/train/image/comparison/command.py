"""From what is asked for to its files: what the comparison does."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...ablation.command import Interrupted
from ...errors import UserError
from ...workers import Say, speak
from .data import Data, prepare
from .jobs import run_all
from .plan import NAME, Job, Plan, choose_rows
from .report import best_rates, collect, draw, table, write_json
from .speed import SPEED, measure_models, measure_resolutions, read

DATA = "data"
STAGES = ("speed", "tuning", "runs", "resolutions")


def compare(
    data: str | Path | None,
    out: str | Path,
    *,
    size: str | None = None,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    stages: Sequence[str] = STAGES,
    jobs: int | None = None,
    limit: float | None = None,
    say: Say = speak,
    **settings: Any,
) -> dict[str, Any]:
    """Train image models alike in all else, measure them, and write what was found. Returns what JSON has.

    python -c "from hydra_ssm.train.image.comparison import compare; compare('cifar10.tar.xz', 'runs/cifar', limit=500)"

    What has begun in `out` goes on, with the plan that it has; whatever stopped it, the same call continues.

    Args:
        data: a .tar (also .xz) or folder with train/CLASS/PICTURE and test/CLASS/PICTURE, or a folder that `prepare`
            made; None for scikit-learn's digits.
        out: a folder that is new or holds a comparison.
        size: usual or small; None for what is in `out`, else usual.
        rows: of `ROWS`; none for all.
        seeds: of the runs that count.
        stages: speed (of the models, alone on the device), tuning (of the learning rates), runs, and resolutions
            (base models from 64 to 1,024 pixels), in this order.
        jobs: runs at once; None for 3 on a GPU and 1 on a CPU.
        limit: seconds after which it stops, to be gone on with by the same call.
        settings: fields of `Plan`.

    Raises:
        UserError: what the user can repair.
        Interrupted: SIGINT or SIGTERM came; what the runs had is kept.
    """
    deadline = float("inf") if limit is None else time.time() + limit
    folder, chosen = Path(out), choose_rows(rows)
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"stages must be of {', '.join(STAGES)}, got {min(unknown)}")
    plan = _plan(folder, size, settings)
    pictures = Path(data) if data is not None and (Path(data) / "pictures.json").is_file() else folder / DATA
    say("decoding the pictures" if not pictures.exists() else f"pictures of {pictures}")
    prepare(data, pictures)
    facts = Data(pictures).facts
    at_once = jobs or (3 if torch.cuda.is_available() else 1)
    received = None
    if "speed" in stages:
        measure_models(folder, plan, chosen, len(facts["classes"]), facts["size"], deadline, say)
        say(_estimate(folder, plan, facts, len(seeds)))
    if "tuning" in stages:
        received = run_all(folder, pictures, plan.tuning(chosen), at_once, deadline, say)
    if "runs" in stages and received is None:
        rates = best_rates(folder, plan, chosen)
        for row in chosen:
            if row not in rates:
                say(f"{row} waits: its learning rates have not all been tried")
        todo = [Job(row, rates[row], seed, False) for seed in seeds for row in chosen if row in rates]
        received = run_all(folder, pictures, todo, at_once, deadline, say)
    if "resolutions" in stages and received is None:
        measure_resolutions(folder, deadline, say)
    return _finish(folder, plan, facts, received, say)


def _estimate(folder: Path, plan: Plan, facts: dict[str, Any], seeds: int) -> str:
    """What the steps of tuning and runs need on the device, one after the other."""
    rows = read(folder / SPEED)["rows"].values()
    steps = facts["train_pictures"] // plan.batch_size
    epochs = seeds * plan.epochs + (
        0.9 * len(plan.learning_rates) * plan.tuning_epochs if plan.learning_rates[1:] else 0
    )
    seconds = sum((row["graph_step"] or row["step"] or 0.0) for row in rows) / 1e3 * steps * epochs
    return f"steps of tuning and runs take about {seconds:,.0f} s of the device, augmentation and the optimiser besides"


def _finish(folder: Path, plan: Plan, facts: dict[str, Any], received: int | None, say: Say) -> dict[str, Any]:
    report = collect(folder, plan, facts)
    say(table(report))
    write_json(report, folder / "images.json")
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed; the same call draws it where it is")
    elif report["runs"]:
        draw(report, folder / "images.png")
    if received is not None:
        raise Interrupted(received, folder)
    return report


def _plan(folder: Path, size: str | None, given: dict[str, Any]) -> Plan:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, it is a file")
    if (folder / NAME).is_file():
        plan = Plan.read(folder)
        plan.check(given | ({"size": size} if size else {}), folder)
        return plan
    if folder.is_dir() and any(folder.iterdir()) and [p.name for p in folder.iterdir()] != [DATA]:
        raise UserError(f"{folder} must be new, empty or hold a comparison, it holds {min(folder.iterdir()).name}")
    plan = Plan.of(size or "usual", given)
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder)
    return plan
