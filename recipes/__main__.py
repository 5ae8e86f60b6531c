"""python -m recipes: lists the recipes, or runs one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra_ssm.cli import exit_code, one_line
from hydra_ssm.train.comparison import compare
from hydra_ssm.train.errors import UserError
from hydra_ssm.train.folder import RunFolder
from hydra_ssm.train.pretrain import pretrain, resume

from . import COMPARISONS, PRETRAINING

USAGE = """python -m recipes NAME [SOURCE ...] [--out DIR] [--resume] [--with NAME=VALUE ...]

Trains by a recipe; --resume goes on where it stopped, and a comparison does so itself. SOURCE: text, or shards that
`hydra-ssm data prepare` wrote; of a comparison, the folder that `hydra-ssm compare prepare` wrote. --with takes other
values for settings: python -m recipes hydra_base c4-128 --with accumulate=1 sharding=fsdp2. The names:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe and return the exit code; 2 and a line for a mistake of the user's."""
    known = PRETRAINING | COMPARISONS
    names = "\n".join(f"  {name:16} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in known.items())
    parser = argparse.ArgumentParser(usage=f"{USAGE}\n{names}", add_help=True)
    parser.add_argument("name", choices=known)
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--with", dest="given", nargs="+", default=[], metavar="NAME=VALUE")
    if not (sys.argv[1:] if argv is None else argv):
        print(f"{USAGE}\n{names}")
        return 0
    asked = parser.parse_args(argv)
    out = asked.out or Path("runs") / asked.name.replace("_", "-")
    try:
        given = dict(map(_setting, asked.given))
        if asked.name in COMPARISONS:
            _compare(asked.name, asked.sources, out, given)
        else:
            _pretrain(asked.name, asked.sources, out, asked.resume or RunFolder(out).is_again(), given)
    except BaseException as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"recipes: error: {one_line(error)}", file=sys.stderr)
        return code
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """A name and a value as JSON has it, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--with takes NAME=VALUE, got {text}")
    try:
        found = json.loads(value)
    except ValueError:
        found = value
    return name, tuple(found) if isinstance(found, list) else found


def _pretrain(name: str, sources: list[str], out: Path, again: bool, given: dict[str, Any]) -> None:
    recipe = _of_settings(PRETRAINING[name], *sources, **given)
    if again:
        resume(out, given | {"preset": recipe.preset} | ({"sources": recipe.sources} if sources else {}))
    else:
        pretrain(recipe, out)


def _compare(name: str, sources: list[str], out: Path, given: dict[str, Any]) -> None:
    if len(sources) != 1:
        raise UserError(f"a comparison needs one folder that `hydra-ssm compare prepare` wrote, got {len(sources)}")
    compare(sources[0], out, **_of_settings(COMPARISONS[name], **given))


def _of_settings(recipe: Callable[..., Any], *sources: str, **given: Any) -> Any:
    try:
        return recipe(*sources, **given)
    except TypeError as error:  # of settings that there are not
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
