"""GLUE of the comparison: both models at once, in a process each, which have processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..finetune.glue import REPORT, glue
from ..records import read_json
from ..workers import Until, end_with_parent
from .data import GLUE
from .plan import MODELS, Plan
from .run import MODELS_FOLDER

FOLDER = "glue"
POLL = 0.5  # seconds


def tasks_done(out: Path, plan: Plan, model: str) -> dict[str, Any] | None:
    """What GLUE found of a model, once all of its runs are finished."""
    found = read_json(out / FOLDER / model / REPORT)
    return found if found and are_whole(found, plan) else None


def are_whole(found: dict[str, Any], plan: Plan) -> bool:
    """Whether a report of GLUE has all runs of the plan."""
    return len(found["runs"]) == len(plan.tasks) * len(plan.task_seeds)


def run_tasks(out: Path, data: Path, plan: Plan, until: Until, jobs: int) -> None:
    """Go on with the tasks of both models, `jobs` runs of each at once. Raises UserError where one fails."""
    left = [model for model in MODELS if tasks_done(out, plan, model) is None]
    context = multiprocessing.get_context("spawn")
    given = (str(out), str(data), plan, until.deadline, jobs)
    processes = {model: context.Process(target=work, args=(model, *given)) for model in left}
    for process in processes.values():
        process.start()
    asked = False
    while any(process.is_alive() for process in processes.values()):
        time.sleep(POLL)
        if until.asked.is_set() and not asked:
            asked = True
            for process in processes.values():
                process.terminate()  # it keeps what it has
    for model, process in processes.items():
        if process.exitcode and not asked:
            raise UserError(f"the tasks of {model} have ended with code {process.exitcode}: the same command goes on")


def work(model: str, out: str, data: str, plan: Plan, deadline: float, jobs: int) -> None:
    """What such a process does."""
    if os.name == "posix":
        os.setpgrp()  # what all are sent would come twice, with that of the parent, and the second time end it
    end_with_parent()
    start = Path(out) / MODELS_FOLDER / f"tokens-{model}-seed-{plan.seeds[0]}"
    glue(
        start, f"{data}/{GLUE}", Path(out) / FOLDER / model, tasks=plan.tasks, seeds=plan.task_seeds, jobs=jobs,
        limit=max(0.0, deadline - time.time()) if deadline < float("inf") else None, direct=True,
        batch_size=plan.task_batch, say=lambda text: print(f"{model}: {text}", flush=True),
    )  # fmt: skip
