"""What a comparison is made of, and which runs follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

from ...checkpoints import whole_file
from ...errors import UserError
from .augment import Strength

NAME = "plan.json"
ROWS = {
    "vit": "ViT: attention and MLP, position embeddings",
    "hydra_vit": "Hydra-ViT, the paper's form: Hydra in place of attention and MLP, no position embeddings",
    "hydra_dropin": "ViT with Hydra in place of attention alone",
    "low_rank": "the paper's form with low-rank matrices (linear attention)",
    "toeplitz": "the paper's form with Toeplitz matrices (a long convolution)",
    "add": "the paper's form with two scans that are added",
}
SIZES: dict[str, dict[str, Any]] = {
    "usual": {},
    "small": {
        "width": 64, "vit_depth": 2, "heads": 2, "headdim": 16, "d_state": 16, "patch": 8, "epochs": 2,
        "tuning_epochs": 1, "batch_size": 64, "learning_rates": (1e-3, 3e-3), "ema_decay": 0.9,
    },
}  # fmt: skip


class Job(NamedTuple):
    """A run: of a row, with a learning rate; to choose the learning rate, or for the result."""

    row: str
    learning_rate: float
    seed: int
    tuning: bool

    def __str__(self) -> str:
        return f"{self.row}, {self.learning_rate:g}, {'tuning' if self.tuning else f'seed {self.seed}'}"

    @property
    def name(self) -> str:
        return f"{self.row}-{self.learning_rate:g}-{'tuning' if self.tuning else f'seed-{self.seed}'}"


@dataclass(frozen=True)
class Plan:
    """Settings that all rows share.

    Args:
        width: of the tokens; `vit_depth`, `heads`: of the ViT, whose parameters are the others' measure.
        headdim, d_state: of the matrix mixers.
        epochs: of a run that counts; `tuning_epochs`: of those that a learning rate is chosen by.
        batch_size: pictures a step.
        learning_rates: the same few for every row; the best on a tenth of the training pictures is taken.
        warm_up: share of the steps.
        ema_decay: of the averaged weights, reached after a warm-up of its own.
        evaluate_every: epochs.

    Raises:
        UserError: a setting out of its range.
    """

    size: str = "usual"
    width: int = 192
    vit_depth: int = 6
    heads: int = 3
    headdim: int = 64
    d_state: int = 64
    patch: int = 4
    epochs: int = 40
    tuning_epochs: int = 10
    batch_size: int = 1024
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    weight_decay: float = 0.05
    warm_up: float = 0.1
    drop_path: float = 0.1
    ema_decay: float = 0.995
    evaluate_every: int = 5
    strength: Strength = field(default_factory=Strength)

    @classmethod
    def of(cls, size: str, given: Mapping[str, Any]) -> Self:
        if size not in SIZES:
            raise UserError(f"size must be one of {', '.join(SIZES)}, got {size}")
        if unknown := given.keys() - {f.name for f in fields(cls)}:
            raise UserError(f"a comparison has no setting {', '.join(sorted(unknown))}")
        strength = given.get("strength", {})
        if isinstance(strength, Mapping):
            given = {**given, "strength": Strength(**strength)}
        return cls(size, **{**SIZES[size], **given})

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and value < 1:
                raise UserError(f"{f.name} must be at least 1, got {value}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates must be at least one, above 0, got {self.learning_rates}")
        if self.batch_size % 2:
            raise UserError(f"batch_size must be even, as pictures are mixed in pairs, got {self.batch_size}")

    def write(self, folder: Path) -> None:
        with whole_file(folder / NAME) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises UserError where there is something else."""
        try:
            found = json.loads((folder / NAME).read_text(encoding="utf-8"))
            strength = Strength(**found.pop("strength"))
            return cls(**found | {"learning_rates": tuple(found["learning_rates"]), "strength": strength})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {folder / NAME}: {error}") from error

    def check(self, given: Mapping[str, Any], folder: Path) -> None:
        """Raises UserError where other settings are asked for than the folder has."""
        for name, value in given.items():
            if name == "strength" and isinstance(value, Mapping):
                value = Strength(**value)
            if getattr(self, name, None) != value:
                raise UserError(
                    f"{name} is {getattr(self, name, None)} in {folder}, got {value}: choose another folder"
                )

    def tuning(self, rows: Sequence[str]) -> list[Job]:
        """The runs that learning rates are chosen by; none where there is one only."""
        if len(self.learning_rates) == 1:
            return []
        return [Job(row, rate, 0, True) for row in rows for rate in self.learning_rates]


def choose_rows(names: Sequence[str]) -> list[str]:
    """Raises UserError. None: all."""
    for name in names:
        if name not in ROWS:
            raise UserError(f"rows must be of {', '.join(ROWS)}, got {name}")
    return list(dict.fromkeys(names)) or list(ROWS)
