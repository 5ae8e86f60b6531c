"""From what is asked for to its files: what the comparison does."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import Interrupted, UserError
from ...plans import NAME, alone, check_plan, read_plan, write_plan
from ...records import read_json, write_json
from ...workers import Say, gpus, speak
from .data import Data, prepare
from .jobs import Ended, run_all
from .loop import RUNS
from .plan import FEWEST, Job, Plan, choose_rows
from .report import best_rates, collect, draw, further_jobs, table
from .speed import SPEED, measure_models, measure_resolutions, read

DATA, PICTURES = "data", "source.json"  # the pictures, and what is left of them where only records are kept
BESIDES = 0.002  # seconds of a step by estimate: augmentation, optimiser, averaging
STAGES = ("speed", "tuning", "runs", "resolutions")


def compare(
    data: str | Path | None,
    out: str | Path,
    *,
    size: str | None = None,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    stages: Sequence[str] | None = None,
    jobs: int | None = None,
    limit: float | None = None,
    budget: float | None = None,
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
            (base models from 64 to 1,024 pixels), in this order; None for all, of a small comparison but the last.
        jobs: runs at once, spread over the GPUs; None for 3 on each, and 1 on a CPU.
        limit: seconds after which it stops, to be gone on with by the same call.
        budget: seconds of the device that tuning and runs may take by the estimate of the stage speed: before the
            first run the plan's epochs are lowered, for all rows alike, until they fit.
        settings: fields of `Plan`.

    Raises:
        UserError: what the user can repair; runs that failed, after all others.
        Interrupted: SIGINT or SIGTERM came; what the runs had is kept.
    """
    deadline = float("inf") if limit is None else time.time() + limit
    folder, chosen = Path(out), choose_rows(rows)
    if unknown := set(stages or ()) - set(STAGES):
        raise UserError(f"stages must be of {', '.join(STAGES)}, got {min(unknown)}")
    with alone(folder, "a comparison", lambda path: path.name == DATA):
        plan = _plan(folder, size, settings, lowered=budget is not None)
        stages = (STAGES[:-1] if plan.size == "small" else STAGES) if stages is None else stages
        pictures = Path(data) if data is not None and (Path(data) / "pictures.json").is_file() else folder / DATA
        say("decoding the pictures" if not pictures.exists() else f"pictures of {pictures}")
        prepare(data, pictures)
        facts = _facts(folder, pictures)
        count = jobs or (3 * torch.cuda.device_count() if torch.cuda.is_available() else 1)
        if "speed" in stages:
            measure_models(folder, plan, chosen, len(facts["classes"]), facts["size"], deadline, say)
            plan = _within(folder, plan, partial(seconds_of, folder, facts, chosen, len(seeds)), budget, say)
        elif budget is not None:
            say("the budget has no effect: it takes the stage speed to know what a step costs")
        run = partial(run_all, folder, pictures, jobs=count, deadline=deadline, say=say)
        ended = Ended(None, [])
        if "tuning" in stages:
            ended = _tuned(folder, plan, chosen, run, deadline)
        if "runs" in stages:
            ended = ended.then(lambda: run(_to_run(folder, plan, chosen, seeds, say)))
        if "resolutions" in stages and ended.signal is None:
            measure_resolutions(folder, deadline, say)
        return _finish(folder, plan, facts, ended, say)


def _tuned(folder: Path, plan: Plan, rows: Sequence[str], run: Callable[[list[Job]], Ended], deadline: float) -> Ended:
    """The learning rates of the plan, then those beyond them, for rows whose best one is the last."""
    ended, asked = run(plan.tuning(rows)), set[Job]()
    while time.time() < deadline and (more := [job for job in further_jobs(folder, plan, rows) if job not in asked]):
        asked |= set(more)
        ended = ended.then(partial(run, more))
        if ended.signal is not None:
            break
    return ended


def _to_run(folder: Path, plan: Plan, rows: Sequence[str], seeds: Sequence[int], say: Say) -> list[Job]:
    """The runs that count, all rows with one seed before the next."""
    rates = best_rates(folder, plan, rows)
    for row in rows:
        if row not in rates:
            say(f"{row} waits: its learning rates have not all been tried")
    return [Job(row, rates[row], seed, False) for seed in seeds for row in rows if row in rates]


def seconds_of(folder: Path, facts: dict[str, Any], rows: Sequence[str], seeds: int, plan: Plan) -> float:
    """What tuning and runs of the rows that are measured need of the devices by estimate, one after the other."""
    known = read(folder / SPEED)["rows"]
    measured = [known[row]["graph_step"] or known[row]["step"] for row in rows if row in known]
    step = sum(ms / 1e3 + BESIDES for ms in measured if ms)
    rates = len(plan.learning_rates) + plan.further_rates / 2 if plan.learning_rates[1:] else 0
    epochs = seeds * plan.epochs + 0.9 * rates * plan.tuning_epochs
    return step * (facts["train_pictures"] // plan.batch_size) * epochs / max(1, len(gpus()))


def _within(folder: Path, plan: Plan, seconds: Callable[[Plan], float], budget: float | None, say: Say) -> Plan:
    """The plan, before its first run with as many epochs as fit into the budget."""
    if budget is not None and not any((folder / RUNS).glob("*")):
        plan = plan.within(budget, seconds)
        write_plan(plan, folder)
    say(
        f"{plan.epochs} epochs, {plan.tuning_epochs} for each learning rate: the steps take about "
        f"{seconds(plan):,.0f} s of the device, evaluations and the start of each process besides"
    )
    if budget is not None and seconds(plan) > budget:
        say(f"more than the budget of {budget:,.0f} s: epochs are lowered before the first run, to {FEWEST} at least")
    return plan


def _finish(folder: Path, plan: Plan, facts: dict[str, Any], ended: Ended, say: Say) -> dict[str, Any]:
    report = collect(folder, plan, facts)
    say(table(report))
    write_json(folder / "images.json", report, indent=1)
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed; the same call draws it where it is")
    elif report["runs"]:
        draw(report, folder / "images.png")
    if ended.signal is not None:
        raise Interrupted(ended.signal, folder)
    if ended.failed:
        raise UserError(
            f"{len(ended.failed)} runs failed, the others are in {folder / 'images.json'}: {'; '.join(ended.failed)}. "
            f"{folder / RUNS}/*.failed say where; the same call tries them again, after the others"
        )
    return report


def _facts(folder: Path, pictures: Path) -> dict[str, Any]:
    """Of the pictures. Raises UserError where the comparison has been made of others so far."""
    data, file = Data(pictures), folder / PICTURES
    now = {"source": data.facts["source"], "train": len(data.train), "test": len(data.test), "digest": data.digest()}
    if (before := read_json(file)) is None:
        write_json(file, now, indent=2)
    elif before["digest"] != now["digest"]:
        was, got = (f"{d['source']} ({d['train']:,} and {d['test']:,} pictures)" for d in (before, now))
        raise UserError(f"the comparison in {folder} is of {was}, got others of {got}: choose another --out")
    return data.facts


def _plan(folder: Path, size: str | None, given: dict[str, Any], lowered: bool) -> Plan:
    """What the folder has, or is given now. lowered: its epochs may be fewer than are given."""
    if (folder / NAME).is_file():
        plan = read_plan(Plan, folder)
        asked = {k: v for k, v in given.items() if not (lowered and k in ("epochs", "tuning_epochs"))}
        check_plan(plan, asked | ({"size": size} if size else {}), f"the comparison in {folder}")
        return plan
    plan = Plan.of(size or "usual", given)
    write_plan(plan, folder)
    return plan
