"""The folder of a run: which files are its own, and whether a new run may begin there.

config.json, model.safetensors, tokenizer files, README.md, loss.png, metrics.json    the result
training/recipe.json, config.json, tokenizer/, train/, held_out/                       what it is made of
training/model.safetensors                                    the weights that it began with, if they are another's
training/checkpoints/, tensorboard/                                                    how far it is
training/finished.json                                                                 the files of the result
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoints import MANIFEST, UNFINISHED, damage, remove, restore, sync, whole_folder
from .distributed import restarted
from .errors import UserError
from .recipe import Recipe
from .records import write_json


class RunFolder:
    """Paths of a run, and the steps that make one of them whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.training = path / "training"
        self.checkpoints = self.training / "checkpoints"
        self.tensorboard = self.training / "tensorboard"
        self.recipe = self.training / "recipe.json"
        self.finished = self.training / "finished.json"
        self.overwriting = path / f"{UNFINISHED}overwriting"  # there while a run stands in the place of the next one

    def exists(self) -> bool:
        """Whether a run has begun here. Brings back one that a killed process was about to replace."""
        restore(self.training)
        return self.recipe.is_file()

    def is_again(self) -> bool:
        """Whether the launcher repeats the command that began the run here, as it does after a process has died."""
        return restarted() and self.exists() and not self.overwriting.exists()

    def read_recipe(self) -> Recipe:
        """Raises UserError where there is no run or its settings cannot be read."""
        if not self.exists():
            raise UserError(f"there is no run in {self.path} to resume: start it without --resume")
        try:
            return Recipe.from_json(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.recipe}: {error}") from error

    def onward(self) -> str:
        """What goes on with it."""
        return f"--model {self.path} --out NEW to train its model further" if self.result() else "--resume to go on"

    def check_free(self, overwrite: bool) -> None:
        """Raises UserError where something is in the way of a new run. Nothing that is not of a run is ever removed."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} must be a folder, it is a file")
        if self.exists():
            if not overwrite:
                raise UserError(f"{self.path} already holds a run: add {self.onward()}, or --overwrite to start again")
            return
        entries = sorted(p.name for p in self.path.iterdir()) if self.path.exists() else []
        foreign = [name for name in entries if not name.startswith(UNFINISHED)]
        if foreign:
            raise UserError(f"{self.path} must be new, empty or hold a run, it holds {_some(foreign)}")

    @contextmanager
    def begin(self, overwrite: bool) -> Iterator[Path]:
        """A folder to prepare, which becomes `training` when it is complete: only then is an old run removed."""
        self.check_free(overwrite)
        if self.exists():
            self.overwriting.touch()
        old, new = self.result(), not self.path.exists()
        try:
            with whole_folder(self.training) as part:
                yield part
        except BaseException as error:
            if isinstance(error, UserError):  # a mistake leaves nothing behind
                remove(self.overwriting)
            if new and self.path.exists() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise
        for name in old:
            remove(self.path / name)
        remove(self.overwriting)

    def check_prepared(self) -> None:
        """Raises UserError where what the run is made of has changed, so that it cannot go on as it began."""
        reason = damage(self.training)
        if reason:
            raise UserError(f"{self.training} is damaged ({reason}): start again with --overwrite")

    def result(self) -> list[str]:
        """Names of the result's files; none where the run is not finished."""
        try:
            names = json.loads(self.finished.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return names if all((self.path / name).exists() for name in names) else []

    @contextmanager
    def finish(self) -> Iterator[Path]:
        """A folder for the files of the result, which are moved into place when all are complete."""
        staging = self.training / "result"
        with whole_folder(staging) as part:
            yield part
        remove(staging / MANIFEST)
        names = sorted(p.name for p in staging.iterdir())
        for name in names:
            (staging / name).replace(self.path / name)
        sync(self.path)
        write_json(self.finished, names)
        remove(staging)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
