"""From what is asked for to the paper's table: what `hydra-ssm glue` does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import Interrupted, UserError
from ..plans import NAME, alone, check_plan, read_plan, write_plan
from ..records import write_json
from ..workers import Say, speak, usual_jobs
from . import metrics
from .data import TaskData, find
from .engine import SHORTEST, load_words
from .jobs import run_all
from .report import collect, table
from .run import Key, Plan, finished, weights_of
from .tasks import MNLI, TASKS, choose

REPORT = "glue.json"
SEEDS = (0, 1, 2, 3, 4)


def glue(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
    jobs: int | None = None,
    limit: float | None = None,
    direct: bool = False,
    say: Say = speak,
    **settings: Any,
) -> dict[str, Any]:
    """What `hydra-ssm glue` does, for a machine where what parses its options is missing. Returns what JSON has.

    python -c "from hydra_ssm.train.finetune import glue; glue('runs/mine', 'glue/', jobs=4, limit=500)"

    What has begun in `out` goes on, with the settings that it has. Needs torch, einops, NumPy, transformers,
    tokenizers, accelerate, safetensors, SciPy and scikit-learn; for data sets that are not TSV files, datasets.

    Args:
        model: a folder that pretrain, convert or save_pretrained wrote, with its tokenizer.
        data: a folder with one folder a task, as GLUE is distributed, or the name of a Hugging Face data set.
        out: a folder that is new, empty or holds such runs; None for glue/ in the model's folder.
        tasks: their names, none for all. MNLI is run besides where others start from it.
        seeds: of the heads, the order of the examples and the dropout.
        jobs: runs at once; None for one on each GPU, and on a CPU as many as it has cores, but 8 at most.
        limit: seconds after which the runs stop, to be gone on with by the same call.
        direct: every task starts from the model; else RTE, MRPC and STS-B from the model fine-tuned on MNLI.
        settings: length, learning_rate, epochs, batch_size: in place of the paper's for all tasks.

    Raises:
        UserError: what the user can repair.
        ImportError: SciPy or scikit-learn is missing.
        Interrupted: SIGINT or SIGTERM came; what the runs had is kept.
    """
    started = time.time()
    metrics.check_installed()
    _check(seeds, jobs, limit, settings)
    chosen = _choose(tasks)
    load_words(model)
    folder = Path(model) / "glue" if out is None else Path(out)
    given = {name: value for name, value in settings.items() if value is not None}
    plan = Plan(str(model), weights_of(Path(model)), str(data), direct, **given)
    there, absent = _look(plan, chosen)
    with alone(folder, "runs of glue"):
        _agree(plan, folder)
        for reason in absent:
            say(reason)
        keys = [Key(name, seed) for seed in dict.fromkeys(seeds) for name in there]
        _tell(folder, there, keys, say)
        deadline = float("inf") if limit is None else started + limit
        received = run_all(folder, keys, direct, jobs or usual_jobs(), deadline, say)
        report = collect(folder, plan, absent)
        if report["runs"]:
            say(table(report))
        if left := [key for key in keys if finished(folder, key) is None]:
            say(f"{len(left)} of {len(keys)} runs are not finished: the same command goes on")
        write_json(folder / REPORT, report, indent=2, allow_nan=False)
        say(f"wrote {folder / REPORT}")
    if received is not None:
        raise Interrupted(received, folder)
    return report


def _choose(tasks: Sequence[str]) -> list[str]:
    try:
        return choose(list(tasks))
    except ValueError as error:
        raise UserError(str(error)) from None


def _check(seeds: Sequence[int], jobs: int | None, limit: float | None, settings: dict[str, Any]) -> None:
    if (jobs is not None and jobs < 1) or (limit is not None and not limit >= 0):
        raise UserError(f"jobs must be at least 1 and limit not negative, got jobs {jobs} and limit {limit}")
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"seeds must be at least 0 and below {2**32}, one or more, got {list(seeds)}")
    if (length := settings.get("length")) is not None and length < SHORTEST:
        raise UserError(f"length must be at least {SHORTEST}, got {length}")
    for name, value in settings.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be above 0, got {value}")


def _look(plan: Plan, chosen: Sequence[str]) -> tuple[dict[str, TaskData], list[str]]:
    """Where the data of each task is, MNLI's too where others start from it; and what is not there."""
    wanted = set(chosen)
    if not plan.direct and any(TASKS[name].after_mnli for name in chosen):
        wanted.add(MNLI)
    found = {name: find(plan.data, TASKS[name]) for name in TASKS if name in wanted}
    there = {name: data for name, data in found.items() if not isinstance(data, str)}
    absent = [f"{name} is left out: {reason}" for name, reason in found.items() if isinstance(reason, str)]
    if not there:
        raise UserError(f"--data must hold one of the tasks, {plan.data} holds none: {absent[0]}")
    later = [name for name in there if TASKS[name].after_mnli]
    if later and MNLI not in there and not plan.direct:
        absent.append(f"{', '.join(later)}: without MNLI, from the model itself")
    return there, absent


def _agree(plan: Plan, folder: Path) -> None:
    """Runs of a folder have one plan. Raises UserError where it has another."""
    if (folder / NAME).is_file():
        before, given = read_plan(Plan, folder), asdict(plan)
        if before.weights != plan.weights:
            raise UserError(f"the model has other weights than the runs that {folder} holds: choose another --out")
        del given["model"], given["data"]  # these may have been moved
        check_plan(before, given, f"the runs that {folder} holds")
    write_plan(plan, folder)


def _tell(folder: Path, there: dict[str, TaskData], keys: Sequence[Key], say: Say) -> None:
    """What is read, and what of it is left out, before the first run of a task."""
    for name, data in there.items():
        if all(finished(folder, key) for key in keys if key.task == name):
            continue
        parts = {"train": data.train(), **{f"dev{ending}": read() for ending, read in data.dev.items()}}
        parts |= {f"test ({name})": read() for name, read in data.test.items()}
        say(f"{name}: {', '.join(f'{part} {len(found):,}' for part, found in parts.items())}".replace("_", " "))
        for found in parts.values():
            for remark in found.remarks:
                say(f"  {remark}")
