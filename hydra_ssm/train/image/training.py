"""Training of an image classifier by the paper's recipe, from pictures to a folder that timm loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .folder import DATA, TRAINED_ON, ImageFolder
from .loading import training_transform
from .processes import processes
from .recipe import ImageRecipe
from .result import create
from .run import Run, facts
from .sources import Parts, in_full, is_divided, open_parts


def train(recipe: ImageRecipe, out: Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Train a classifier and leave it in the folder `out`. Returns its metrics, None in processes that only help.

    Under torchrun every process calls it. overwrite: a run that is there already is removed, once the new one has read
    its data.

    Raises:
        UserError: a mistake of the user's, training that diverges, or a full disk; what was saved before is intact.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    folder, recipe = ImageFolder(out), replace(recipe, data=in_full(recipe.data))
    with processes() as own:
        _check_divides(recipe, own.world)
        parts = _begun(folder, recipe, overwrite) if own.first else None
        own.wait()
        return Run(folder, own, parts).train()


def resume(out: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Go on with the run in `out` from its newest whole checkpoint. Returns its metrics; those it has, if it has ended.

    On a CPU the result is what it would have been without the interruption, to the last bit, given the same number of
    processes and threads.

    Args:
        given: settings that the run must have, by name.

    Raises:
        UserError: there is no run, it has other settings, or its pictures have changed; or a full disk.
        Stopped: as in `train`.
    """
    folder = ImageFolder(out)
    recorded = asdict(folder.read_settings())
    asked = dict(given or {})
    if "data" in asked:
        asked["data"], recorded["data"] = in_full(asked["data"]), in_full(recorded["data"])
    for name, value in asked.items():
        if name != "workers" and recorded[name] != value:
            raise UserError(f"{name} is {recorded[name]} in the run that goes on in {out}, got {value}")
    if folder.result():
        return json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    folder.check_prepared()
    with processes() as own:
        _check_divides(folder.read_settings(), own.world)
        return Run(folder, own).train()


def _begun(folder: ImageFolder, recipe: ImageRecipe, overwrite: bool) -> Parts:
    """The pictures of a new run, once its folder is there. Raises UserError before anything is written."""
    folder.check_free(overwrite)
    train_part, held_out, classes = parts = open_parts(recipe.data, recipe.seed)
    if len(classes) < 2:
        raise UserError(f"there must be pictures of at least two classes, got {classes[0]} alone")
    _, config = create(recipe, len(classes))
    training_transform(recipe, config)
    if len(train_part) < recipe.batch_size:
        raise UserError(
            f"there must be as many pictures to train on as in a step, {recipe.batch_size}, got {len(train_part)}: "
            "choose a smaller --batch-size"
        )
    with folder.begin(overwrite) as part:
        (part / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
        (part / DATA).write_text(json.dumps(facts(*parts)) + "\n", encoding="utf-8")
        if not is_divided(train_part, held_out):  # an evaluation must know what was held out
            np.save(part / TRAINED_ON, np.sort(train_part.marks()))
    return parts


def _check_divides(recipe: ImageRecipe, world: int) -> None:
    share = recipe.batch_size // recipe.accumulate
    if share % world or (recipe.mixes and share // world % 2):
        raise UserError(
            f"batch_size = {recipe.batch_size} in accumulate = {recipe.accumulate} parts must divide among {world} "
            f"processes{', evenly for mixup and cutmix' if recipe.mixes else ''}"
        )
