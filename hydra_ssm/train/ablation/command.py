"""From what is asked for to its files: what `hydra-ssm ablate` does."""

from __future__ import annotations

import importlib.util
import shlex
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ...text.messages import quiet
from ..errors import Interrupted, UserError
from ..plans import NAME, alone, check_plan, read_plan, write_plan
from ..records import record_files, write_report
from ..workers import Say, speak, usual_jobs
from . import data as store
from .jobs import run_all
from .models import GROUPS, choose, config
from .plan import SEEDS, SIZES, Plan
from .report import collect, draw, table, write_csv
from .run import DATA, RUNS, Key, read

REPORT = "ablation"  # begins the names of its files
USUAL = "medium"  # size
IN_TABLES = {row for rows in GROUPS.values() for row in rows}


def ablate(
    data: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    *,
    size: str | None = None,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int | None = None,
    limit: float | None = None,
    say: Say = speak,
    **settings: Any,
) -> dict[str, Any]:
    """What `hydra-ssm ablate` does, for a machine where what parses its options is missing. Returns what JSON has.

    python -c "from hydra_ssm.train.ablation import ablate; ablate('books/', 'runs/books', limit=500, jobs=4)"

    What has begun in `out` goes on, with the plan that it has. Needs torch, einops, NumPy, transformers, tokenizers,
    accelerate and safetensors; for the picture matplotlib.

    Args:
        data: text files, folders, data set names, or the folder data/ of another ablation; none for Python's language
            reference.
        out: a folder that is new, empty or holds an ablation; None for runs/ablation-SIZE, -unmatched after it if so.
        size: small, medium or paper; None for what is in `out`, else medium.
        rows: names of rows or of the paper's tables (table2, table3, table10); none for all.
        seeds: none for 0 and 1 if small, else 0, 1 and 2.
        jobs: runs at once, spread over the GPUs; None for one on each, and on a CPU as many as it has cores, but 8 at
            most.
        limit: seconds after which the runs stop, to be gone on with by the same call. 0 prepares the data alone.
        settings: fields of `Plan`.

    Raises:
        UserError: what the user can repair.
        Interrupted: SIGINT or SIGTERM came; what the runs had is kept.
    """
    started = time.time()
    if (jobs is not None and jobs < 1) or (limit is not None and not limit >= 0):
        raise UserError(f"jobs must be at least 1 and limit not negative, got jobs {jobs} and limit {limit}")
    given = _given(data, settings)
    chosen = choose(rows)
    default = f"ablation-{size or USUAL}{'-unmatched' if given.get('unmatched') else ''}"
    folder = Path("runs") / default if out is None else Path(out)
    with alone(folder, "an ablation", _is_data):
        plan = _plan(folder, size, given, chosen, seeds, say)
        keys = [Key(row, seed) for seed in dict.fromkeys(seeds or _usual_seeds(plan)) for row in chosen]
        keys.sort(key=lambda key: key.row not in IN_TABLES)  # stable: whatever stops them, first those of the paper
        deadline = float("inf") if limit is None else started + limit
        received = run_all(folder, keys, jobs or usual_jobs(), deadline, say)
        keys = list(dict.fromkeys([*keys, *_kept(folder)]))
        report = collect(folder, keys, _command(plan, keys))
        say(table(report))
        _write(report, folder, say)
    if received is not None:
        raise Interrupted(received, folder)
    return report


def _given(data: str | Path | Sequence[str | Path], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that somebody has given, texts by their names."""
    sources = [data] if isinstance(data, str | Path) else data
    given = {**settings, **({"sources": sources} if sources else {})}
    return given | {name: tuple(map(str, given[name])) for name in ("sources", "held_out") if name in given}


def _is_data(path: Path) -> bool:
    """Which an ablation that was killed while it began may have left."""
    return path.name == DATA and store.is_prepared(str(path))


def _plan(
    folder: Path, size: str | None, given: dict[str, Any], chosen: Sequence[str], seeds: Sequence[int], say: Say
) -> Plan:
    """The plan of the folder, or a new one whose data is made. Mistakes are told before the text is read."""
    begun = (folder / NAME).is_file()
    plan = read_plan(Plan, folder) if begun else Plan.of(size or USUAL, given)
    for seed in seeds:
        plan.recipe(seed)  # raises where it is out of its range
    if begun:
        check_plan(plan, given | ({"size": size} if size else {}), f"the ablation that goes on in {folder}")
        store.check_whole(folder / DATA)
        say(f"going on in {folder}, with the settings that it has")
    else:
        for row in chosen:
            config(plan, row, plan.vocab_size)  # raises where it cannot be matched
        with quiet():
            store.write(plan.recipe(0), plan.held_out_rows, folder / DATA)
        write_plan(plan, folder)
    facts = store.Data(folder / DATA).facts
    say(
        f"{plan.setting}; {facts['train_rows']:,} rows of {facts['length']} tokens to train on, "
        f"{facts['held_out_rows']:,} held out, {facts['vocabulary']:,} different tokens"
    )
    return plan


def _kept(folder: Path) -> list[Key]:
    """The runs that are finished already, chosen or not."""
    records = [read(file) for file in record_files(folder / RUNS)]
    return [Key(record["row"], record["seed"]) for record in records]


def _command(plan: Plan, keys: Sequence[Key]) -> str:
    """That does the same again."""
    usual = SIZES[plan.size]
    words = ["hydra-ssm", "ablate", *plan.sources]
    words += [] if plan.size == USUAL else [f"--{plan.size}"]
    for field in fields(plan):
        value = getattr(plan, field.name)
        if field.name in ("size", "sources") or value == usual.get(field.name, field.default):
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    rows, seeds = list(dict.fromkeys(key.row for key in keys)), sorted({key.seed for key in keys})
    words += ["--rows", *rows] if set(rows) != set(choose(())) else []
    words += ["--seeds", *map(str, seeds)] if seeds != [*_usual_seeds(plan)] else []
    return shlex.join(words)


def _usual_seeds(plan: Plan) -> tuple[int, ...]:
    return SEEDS.get(plan.size, (0, 1, 2))


def _write(report: dict[str, Any], folder: Path, say: Say) -> None:
    files = {".json": write_report, ".csv": write_csv}
    if importlib.util.find_spec("matplotlib") is None:
        say("no picture: matplotlib is not installed; the same command draws it where it is")
    elif report["runs"]:
        files[".png"] = draw
    paths = [folder / f"{REPORT}{ending}" for ending in files]
    for path, write in zip(paths, files.values(), strict=True):
        write(report, path)
    say(f"wrote {', '.join(map(str, paths))}")
