"""A folder of runs: nobody else works in it, and a file has the settings that all of them share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from .checkpoints import UNFINISHED
from .errors import UserError
from .records import write_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Plan = TypeVar("Plan", bound=DataclassInstance)
else:
    Plan = TypeVar("Plan")

NAME, LOCK = "plan.json", ".lock"


@contextmanager
def alone(folder: Path, what: str, ours: Callable[[Path], bool] = lambda _: False) -> Iterator[None]:
    """Nobody else works in the folder; a mistake leaves none behind that was not there. Raises UserError.

    Args:
        folder: new, empty or with a plan.
        what: it is for.
        ours: whether something may lie in it already where there is no plan yet.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, it is a file")
    there = folder.iterdir() if folder.is_dir() else ()
    foreign = [p.name for p in there if p.name != LOCK and not p.name.startswith(UNFINISHED) and not ours(p)]
    if foreign and not (folder / NAME).is_file():
        raise UserError(f"{folder} must be new, empty or hold {what}, it holds {min(foreign)}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        _lock(file, folder)
        try:
            yield
        finally:
            if all(path.name == LOCK for path in folder.iterdir()):
                shutil.rmtree(folder)


def _lock(file: TextIO, folder: Path) -> None:
    """Until the file is closed, where the system knows such locks."""
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}: choose another --out, or wait") from None


def write_plan(plan: DataclassInstance, folder: Path) -> None:
    """All settings of a dataclass, into a file of the folder, whole or not at all."""
    write_json(folder / NAME, asdict(plan), indent=2)


def read_plan(kind: type[Plan], folder: Path) -> Plan:
    """What `write_plan` wrote of such a dataclass. Raises UserError for anything else."""
    try:
        return kind(**known_settings(kind, json.loads((folder / NAME).read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {folder / NAME}: {error}") from error


def known_settings(kind: type[DataclassInstance], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, lists as tuples. Raises UserError where it is no setting of the dataclass."""
    if unknown := given.keys() - {field.name for field in fields(kind)}:
        raise UserError(f"there is no setting {', '.join(sorted(unknown))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def check_plan(plan: DataclassInstance, given: Mapping[str, Any], where: str) -> None:
    """Raises UserError where other settings are asked for than those of the plan, which `where` has."""
    asked = replace(plan, **known_settings(type(plan), given))  # in the form that the dataclass keeps them in
    for name in given:
        if getattr(plan, name) != getattr(asked, name):
            raise UserError(
                f"{name} is {getattr(plan, name)} in {where}, got {getattr(asked, name)}: choose another --out"
            )
