"""JSON files that are whole or not there: records of runs, and reports of many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoints import UNFINISHED, whole_file
from .errors import UserError

Record = dict[str, Any]


def write_json(path: Path, found: Any, **form: Any) -> None:
    """Into a folder that may be new. form: options of json.dumps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        text = json.dumps(found, **form) + "\n"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character, as JSON spells it


def read_json(path: Path) -> Any:
    """What such a file holds; None where there is none. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and what it tells of is done again") from error


def record_files(folder: Path) -> list[Path]:
    """Those of a folder, by their names, but for what a killed process has not finished."""
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith(UNFINISHED))


def read_records(folder: Path) -> list[Record]:
    """All that lie in a folder, by their names. Raises UserError where one is damaged."""
    return [read_json(file) for file in record_files(folder)]


def write_report(report: Record, path: Path) -> None:
    """With its `runs` a line each."""
    rest = {name: value for name, value in report.items() if name != "runs"}
    runs = ",\n".join(f"  {json.dumps(run)}" for run in report["runs"])
    text = json.dumps(rest, indent=1).removesuffix("\n}") + f',\n "runs": [\n{runs}\n ]\n}}\n'
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
