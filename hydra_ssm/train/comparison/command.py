"""From what is asked for to its files: what `hydra-ssm compare` does."""

from __future__ import annotations

import importlib.util
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from ...bench.machine import device_name
from ..errors import Interrupted, UserError
from ..loop import own_device
from ..plans import NAME, alone, check_plan, read_plan, write_plan
from ..records import Record, write_report
from ..trainee import How
from ..workers import Event, Say, Until, gpus, speak, stopping, together, until
from .data import Data, check_whole
from .plan import MODELS, Choice, Plan, Run, length_runs, seconds_run, token_runs
from .report import Report, collect, draw_curves, draw_lengths, table, take_over
from .run import MODELS_FOLDER, RUNS, all_finished, finished, free_memory, train
from .tasks import run_tasks, tasks_done
from .tuning import choices, next_runs

REPORT = "comparison"  # begins the names of its files
STAGES = ("tokens", "tasks", "lengths", "seconds", "seeds")


def compare(
    data: str | Path,
    out: str | Path,
    *,
    limit: float | None = None,
    stages: tuple[str, ...] = STAGES,
    jobs: int = 1,
    records: str | Path | None = None,
    graph: bool = True,
    compile: bool = True,
    say: Say = speak,
    **settings: Any,
) -> Report:
    """What `hydra-ssm compare` does, for a machine where what parses its options is missing. Returns what JSON has.

    python -c "from hydra_ssm.train.comparison import compare; compare('runs/compare/data', 'runs/compare', limit=500)"

    What has begun in `out` goes on, with the plan that it has. Needs torch, einops, NumPy, transformers, tokenizers,
    accelerate, safetensors, SciPy and scikit-learn; for the pictures matplotlib.

    Args:
        data: a folder that `prepare` wrote.
        out: a folder that is new or holds a comparison; data/ in it does not disturb.
        limit: seconds after which all stops, to be gone on with by the same call.
        stages: which parts, in their order, after the learning rates: tokens, tasks, lengths, seconds, seeds.
        jobs: GLUE runs of each model at once, spread over the GPUs; of other runs each GPU has one at a time.
        records: the comparison.json of another machine, of the same data: what it has finished is not done again.
        graph, compile: on a GPU, replay a CUDA graph of a step, and compile the layers.
        settings: fields of `Plan`, for a comparison that begins.

    Raises:
        UserError: what the user can repair.
        Interrupted: SIGINT or SIGTERM came; what the runs had is kept.
    """
    started = time.time()
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"stages must be of {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if jobs < 1 or (limit is not None and not limit >= 0):
        raise UserError(f"jobs must be at least 1 and limit not negative, got jobs {jobs} and limit {limit}")
    folder = Path(out)
    with alone(folder, "a comparison", lambda path: path.name != RUNS):
        check_whole(Path(data))
        if records is not None:
            take_over(Path(records), folder, Data(Path(data)).facts)
        plan = _plan(folder, settings)
        asked: Event = threading.Event()
        end = Until(asked, float("inf") if limit is None else started + limit)
        comparison = Comparison(folder, plan, Data(Path(data)), end, How(graph, compile), jobs, say)
        with stopping(asked) as received:
            comparison.go_on(stages)
        report = collect(folder, plan, comparison.data, list(dict.fromkeys(comparison.left)))
        say(table(report))
        _write(report, folder, say)
    if number := comparison.signal or (received[0] if received else None):
        raise Interrupted(number, folder)
    return report


class Comparison:
    """The parts, each made of what the ones before it have found."""

    def __init__(self, out: Path, plan: Plan, data: Data, until: Until, how: How, jobs: int, say: Say) -> None:
        self.out, self.plan, self.data, self.until, self.how, self.jobs = out, plan, data, until, how, jobs
        self.say = say
        self.left: list[str] = []
        self.signal: int | None = None  # that other processes were stopped by

    def go_on(self, stages: tuple[str, ...]) -> None:
        """As far as the time allows."""
        if not self._tuned():
            self.left.append("all after the learning rates")
            return
        chosen = choices(self.plan, all_finished(self.out))
        found = (f"{model} with {choice.norm}-norm at {choice.rate:g}" for model, choice in chosen.items())
        self.say(f"best: {', '.join(found)}")
        first = token_runs(self.plan, chosen, self.plan.seeds[0])
        if "tokens" in stages:
            self._train(first)
        if "tasks" in stages and not self._has_tasks() and self._whole("tasks", first):
            self._tasks()
        later = "seeds" in stages and not self._seeds_at_hand()  # of another machine's records none has its models here
        if "lengths" in stages and not later:
            self._lengths(chosen)
        last = self._seconds(chosen, first) if "seconds" in stages else []
        if "seeds" in stages:
            last += [run for seed in self.plan.seeds[1:] for run in token_runs(self.plan, chosen, seed)]
        self._train(last)
        if "lengths" in stages and later:
            self._lengths(chosen)

    def _tuned(self) -> bool:
        """Whether all learning rates have been tried, those that follow from others included."""
        while runs := next_runs(self.plan, all_finished(self.out)):
            if self._train(runs) is None:
                return False
        return True

    def _train(self, runs: list[Run]) -> list[Record] | None:
        """The records of all of them, or None. Of several GPUs each works on one at a time."""
        todo = [run for run in runs if finished(self.out, run.name) is None]
        count = min(len(gpus()), len(todo))
        if count > 1 and not self.until.over():
            free_memory()  # that a run of this process has left
            work = partial(_work, self.out, self.plan, self.data.folder, self.how)
            self.signal = together(todo, work, count, self.until.deadline, lambda run, record: None)
            if self.signal is not None:
                self.until.asked.set()
            found = [finished(self.out, run.name) for run in runs]
        else:
            found = [train(self.out, run, self.plan, self.data, self.until, self.how, self.say) for run in runs]
        self.left += [run.name for run, record in zip(runs, found, strict=True) if record is None]
        whole = [record for record in found if record is not None]
        return whole if len(whole) == len(runs) else None

    def _whole(self, part: str, runs: list[Run]) -> bool:
        """Whether both models are there to go on with; says what is to be done where one was lost."""
        missing = [run.name for run in runs if not (self.out / MODELS_FOLDER / run.name).is_dir()]
        for name in missing:
            if (record := self.out / RUNS / f"{name}.json").exists():
                self.say(f"{part}: the model of {name} is missing or diverged: remove {record} to train it again")
        self.left += [part] if missing else []
        return not missing

    def _has_tasks(self) -> bool:
        return not self.plan.tasks or all(tasks_done(self.out, self.plan, model) for model in MODELS)

    def _tasks(self) -> None:
        if not self.until.over():
            free_memory()
            run_tasks(self.out, self.data.folder, self.plan, self.until, self.jobs)
        self.left += [f"GLUE of {model}" for model in MODELS if tasks_done(self.out, self.plan, model) is None]

    def _seeds_at_hand(self) -> list[int]:
        """Those of which both models are here."""
        names = {seed: [f"tokens-{model}-seed-{seed}" for model in MODELS] for seed in self.plan.seeds}
        return [s for s, own in names.items() if all((self.out / MODELS_FOLDER / name).is_dir() for name in own)]

    def _lengths(self, chosen: dict[str, Choice]) -> None:
        """Longer rows, of the seed that they have begun with, else of the first whose models are here."""
        begun = [record["seed"] for record in all_finished(self.out) if record["stage"] == "length"]
        seed = [*begun, *self._seeds_at_hand(), *self.plan.seeds][0]
        runs = length_runs(self.plan, chosen, seed)
        done = all(finished(self.out, run.name) for run in runs)
        if not done and self._whole("lengths", token_runs(self.plan, chosen, seed)):
            self._train(runs)

    def _seconds(self, chosen: dict[str, Choice], first: list[Run]) -> list[Run]:
        """The faster model's run of as many seconds as the slower one's, if that can be had."""
        found = self._train(first)
        if found is None or any("diverged" in record for record in found):
            return []
        seconds = {record["model"]: record["seconds"] for record in found}
        run = seconds_run(self.plan, chosen, self.plan.seeds[0], seconds)
        if reason := "" if finished(self.out, run.name) else _other_clock(found):
            self.say(f"seconds: {reason}")
            self.left.append(f"seconds ({reason})")
            return []
        return [run]


def _work(out: Path, plan: Plan, data: Path, how: How, run: Run) -> Record | None:
    return train(out, run, plan, Data(data), until(), how, speak)


def _other_clock(records: list[Record]) -> str:
    """Why a run on this device cannot be given the seconds of those, if so: seconds compare on one device alone."""
    used = {model: " and ".join(found) for model, found in ((r["model"], r["devices"]) for r in records)}
    if len({device for record in records for device in record["devices"]}) > 1:
        return (
            f"{', '.join(f'{model} was trained on {devices}' for model, devices in used.items())}: give both one device"
        )
    here = device_name(own_device())
    (there,) = set(used.values())
    return "" if there == here else f"both models were trained on {there}, this is {here}"


def _plan(folder: Path, settings: dict[str, Any]) -> Plan:
    if not (folder / NAME).is_file():
        plan = Plan.of(settings)
        write_plan(plan, folder)
        return plan
    plan = read_plan(Plan, folder)
    check_plan(plan, settings, f"the comparison in {folder}")
    return plan


def _write(report: Report, folder: Path, say: Say) -> None:
    write_report(report, folder / f"{REPORT}.json")
    if importlib.util.find_spec("matplotlib") is not None:
        if any(s["stage"] == "tokens" for s in report["summary"]):
            draw_curves(report, folder / f"{REPORT}_curves.png")
        if any(s["stage"] == "length" for s in report["summary"]):
            draw_lengths(report, folder / f"{REPORT}_lengths.png")
    say(f"wrote {folder / REPORT}.json")
