"""The settings that all runs of a comparison share, as a file beside the runs: what goes on with them reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .checkpoints import whole_file
from .errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Plan = TypeVar("Plan", bound=DataclassInstance)
else:
    Plan = TypeVar("Plan")

NAME = "plan.json"


def write_plan(plan: DataclassInstance, folder: Path) -> None:
    """All settings of a dataclass, into a file of the folder, whole or not at all."""
    with whole_file(folder / NAME) as part:
        part.write_text(json.dumps(asdict(plan), indent=2) + "\n", encoding="utf-8")


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
