"""The folder of an image run: as that of a text run, with a recipe of its own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..errors import UserError
from ..folder import RunFolder
from .recipe import ImageRecipe

DATA, TRAINED_ON = "data.json", "trained_on.npy"


class ImageFolder(RunFolder):
    """Paths of a run, and the steps that make one of them whole."""

    def read_settings(self) -> ImageRecipe:
        """Raises UserError where there is no run or its settings cannot be read."""
        if not self.exists():
            raise UserError(f"there is no run in {self.path} to resume: start it without --resume")
        try:
            return ImageRecipe.from_json(self.recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.recipe}: {error}") from error

    def onward(self) -> str:
        """What goes on with it."""
        return "--resume to go on"

    def read_data(self) -> dict[str, Any]:
        """What the pictures were when the run began."""
        return json.loads((self.training / DATA).read_text(encoding="utf-8"))

    def trained_on(self) -> np.ndarray | None:
        """The marks of the pictures that the run trains on, sorted. None where they are not known."""
        file = self.training / TRAINED_ON
        return np.load(file, allow_pickle=False) if self.exists() and file.is_file() else None
