"""GLUE of the comparison: both models at once, in a process each, which have processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..finetune.glue import REPORT, glue
from ..workers import Until
from .data import GLUE
from .plan import MODELS, Plan
from .run import MODELS_FOLDER

FOLDER = "glue"
POLL = 0.5  # seconds


def tasks_done(out: Path, plan: Plan, model: str) -> dict[str, Any] | None:
    """What GLUE found of a model, once all of its runs are finished."""
    try:
        found = json.loads((out / FOLDER / model / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found if len(found["runs"]) == len(plan.tasks) * len(plan.task_seeds) else None


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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start = Path(out) / MODELS_FOLDER / f"tokens-{model}-seed-{plan.seeds[0]}"
    glue(
        start, f"{data}/{GLUE}", Path(out) / FOLDER / model, tasks=plan.tasks, seeds=plan.task_seeds, jobs=jobs,
        limit=max(0.0, deadline - time.time()) if deadline < float("inf") else None, direct=True,
        batch_size=plan.task_batch, say=lambda text: print(f"{model}: {text}", flush=True),
    )  # fmt: skip


def _end_with_parent() -> None:
    """Its own processes end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
