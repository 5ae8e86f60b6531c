"""A folder of shards: begun, gone on with, begun again or found whole."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints import MANIFEST, UNFINISHED, remove, remove_unfinished, whole_file
from ..errors import UserError
from . import state as progress
from .inputs import Input, are_listed, find_inputs
from .pipeline import Batch, Preparation
from .settings import Settings
from .shards import SPLITS, is_shards, read_manifest
from .state import State

JOURNAL = f"{progress.NAME}-journal"
OURS = {*SPLITS, "tokenizer", MANIFEST, "dataset_dict.json", progress.NAME, JOURNAL}


def prepare_shards(
    settings: Settings,
    out: Path,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    show: Callable[[Batch, Counter[str]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Fill the folder `out` with shards, or go on where a killed process stopped: the manifest.

    The result is the same, byte for byte, whatever the number of processes and however often it was interrupted.

    Args:
        jobs: processes that tokenise; None for one a core.
        overwrite: begin again where there are shards, of whatever settings.
        show: called after each batch with all counts so far.

    Raises:
        UserError: a mistake of the user's; what was done before is intact.
    """
    jobs = (os.cpu_count() or 1) if jobs is None else jobs
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}")
    inputs, ignored = find_inputs(settings.sources)
    _check_free(out, settings, inputs, overwrite)
    if not overwrite and is_shards(str(out)):
        remove(out / progress.NAME)
        return read_manifest(out)
    for source in inputs:
        if source.open:
            source.open()  # a wrong name is refused before hours of work on the others
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    state = State(out, overwrite)
    try:
        remove_unfinished(out)
        described = [asdict(settings), [[source.name, *_stamp(source)] for source in inputs]]
        known = None if overwrite else state.get("described")
        if known is not None and not _is_same(known, json.loads(json.dumps(described))):
            raise UserError(f"{out} was begun with other settings or files: add --overwrite to begin again")
        if known is None:
            state.close()
            _clear(out)
            state = State(out)
            state.put("described", described)
            state.commit()
        try:
            return Preparation(settings, out, inputs, ignored, state).run(jobs, show)
        except UserError:
            if state.get("place") is None:  # a mistake leaves nothing behind
                state.close()
                _clear(out)
                remove(out / progress.NAME)
                if new:
                    out.rmdir()
            raise
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{out} cannot keep its progress ({error}): make room on the disk and give the same command again, or add "
            "--overwrite to begin again"
        ) from error
    finally:
        state.close()


def _stamp(source: Input) -> list[int | str]:
    if source.path:
        return [source.size, source.path.stat().st_mtime_ns]
    return [source.content] if source.content else []


def _is_same(known: list[Any], now: list[Any]) -> bool:
    """Of what was described. What an earlier version did not note of an input is not compared."""
    if known[0] != now[0] or len(known[1]) != len(now[1]):
        return False
    return all(new[: len(old)] == old for old, new in zip(known[1], now[1], strict=True))


def _check_free(out: Path, settings: Settings, inputs: list[Input], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} must be a folder, it is a file")
    entries = {p.name for p in out.iterdir()} if out.exists() else set()
    begun = is_shards(str(out)) or progress.NAME in entries
    foreign = sorted(n for n in entries if not n.startswith(UNFINISHED) and not (begun and n in OURS))
    if foreign:
        raise UserError(f"{out} must be new, empty or hold shards, it holds {', '.join(foreign[:3])}")
    if overwrite or not is_shards(str(out)):
        return
    manifest = read_manifest(out)
    if manifest["settings"] != json.loads(json.dumps(asdict(settings))):
        raise UserError(f"{out} holds shards of other settings: choose another --out, or add --overwrite")
    if not are_listed(inputs, manifest["inputs"]):
        raise UserError(
            f"{out} holds shards of other files than there are now: choose another --out, or add --overwrite"
        )


def _clear(out: Path) -> None:
    """Forget what an earlier preparation did, then remove it. All the way it can be seen whose folder it is."""
    remove(out / JOURNAL)
    with whole_file(out / progress.NAME) as part:
        part.touch()
    for name in (MANIFEST, *sorted(OURS - {MANIFEST, progress.NAME})):
        remove(out / name)
