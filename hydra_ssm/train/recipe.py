"""What a pretraining run is made of: every setting, written into the run's folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from .errors import UserError
from .sources import TEXT_COLUMN

# A small text on a CPU: about three minutes on 2 cores. Other presets take the paper's numbers, the defaults below.
SMALL = {
    "vocab_size": 2048,
    "batch_size": 4,
    "steps": 1000,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
}
MOST = 2**32 - 1  # of NumPy's seeds; no other number comes near
BY_PRESET: dict[str, dict[str, Any]] = {"hydra-tiny": SMALL, "bert-tiny": SMALL}


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The defaults are the paper's for its Table 4; `of` takes the preset's.

    Args:
        sources: text files, folders or data set names; none for Python's language reference.
        held_out: the same, to evaluate on; none for a twentieth of the sources.
        column: of a data set, that holds its texts.
        tokenizer: a folder or vocab.txt; None to train one of at most `vocab_size` tokens.
        length: most tokens of a row, and of a piece of a document with its [CLS] and [SEP].
        batch_size: rows in a step, computed in `accumulate` parts of one size.
        weight_decay: torch's, which the learning rate multiplies; the paper's is decoupled, 1e-5 a step.
        mask_rate: of the tokens in training; evaluation hides 0.15.
        save_every, evaluate_every: steps.

    Raises:
        UserError: a setting out of its range.
    """

    preset: str
    sources: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    column: str = TEXT_COLUMN
    tokenizer: str | None = None
    vocab_size: int = 30522
    length: int = 128
    batch_size: int = 4096
    accumulate: int = 1
    steps: int = 70_000
    learning_rate: float = 8e-4
    weight_decay: float = 1e-5 / 8e-4
    mask_rate: float = 0.30
    save_every: int = 1000
    evaluate_every: int = 1000
    seed: int = 0

    @classmethod
    def of(cls, preset: str, **given: Any) -> Self:
        """The recipe of a preset, with what is given in place of its numbers."""
        settings = {**BY_PRESET.get(preset, {}), **given}
        steps = settings.get("steps", cls.steps)
        return cls(preset, **{"save_every": max(1, steps // 10), "evaluate_every": max(1, steps // 5), **settings})

    def __post_init__(self) -> None:
        least = {"length": 3, "vocab_size": 6, "seed": 0}  # [CLS], a token, [SEP]; five special tokens and another
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and value < least.get(field.name, 1):
                raise UserError(f"{field.name} must be at least {least.get(field.name, 1)}, got {value}")
            if field.type == "int" and value > MOST:
                raise UserError(f"{field.name} must be at most {MOST}, got {value}")
            if field.type == "float" and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{field.name} must be a finite number and not negative, got {value}")
        if not 0 < self.mask_rate <= 1:
            raise UserError(f"mask_rate must be above 0 and at most 1, got {self.mask_rate}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}")

    def to_json(self) -> str:
        """All settings."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            return cls(**found | {name: tuple(found[name]) for name in ("sources", "held_out")})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the settings of a run: {error}") from None
