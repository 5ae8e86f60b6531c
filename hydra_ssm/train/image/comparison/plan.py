"""What a comparison is made of, and which runs follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from ...errors import UserError
from ...plans import known_settings
from ...rates import further_rate
from .augment import Strength

ROWS = {
    "vit": "ViT: attention and MLP, position embeddings",
    "hydra_vit": "Hydra-ViT, the paper's form: Hydra in place of attention and MLP, no position embeddings",
    "hydra_dropin": "ViT with Hydra in place of attention alone",
    "low_rank": "the paper's form with low-rank matrices (linear attention)",
    "add": "the paper's form with two scans that are added",
    "toeplitz": "the paper's form with Toeplitz matrices (a long convolution)",
}
LEAST = {"further_rates": 0}
FEWEST = 5  # epochs
SIZES: dict[str, dict[str, Any]] = {
    "usual": {},
    "small": {
        "width": 64, "vit_depth": 2, "heads": 2, "headdim": 16, "d_state": 16, "patch": 8, "epochs": 12,
        "tuning_epochs": 6, "batch_size": 32, "learning_rates": (1e-3, 3e-3, 1e-2), "further_rates": 1,
        "ema_decay": 0.9, "evaluate_every": 2, "strength": {"crop": 0, "randaugment": False, "mix": 0.0},
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
        further_rates: most that a row tries beyond them, each twice the highest or half the lowest, as long as that is
            the best one.
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
    epochs: int = 30
    tuning_epochs: int = 6
    batch_size: int = 512
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    further_rates: int = 2
    weight_decay: float = 0.05
    warm_up: float = 0.1
    drop_path: float = 0.1
    ema_decay: float = 0.995
    evaluate_every: int = 5
    strength: Strength = field(default_factory=Strength)  # or a mapping of its arguments

    @classmethod
    def of(cls, size: str, given: Mapping[str, Any]) -> Self:
        if size not in SIZES:
            raise UserError(f"size must be one of {', '.join(SIZES)}, got {size}")
        return cls(size, **{**SIZES[size], **known_settings(cls, given)})

    def __post_init__(self) -> None:
        if isinstance(self.strength, Mapping):
            object.__setattr__(self, "strength", Strength(**self.strength))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and value < LEAST.get(f.name, 1):
                raise UserError(f"{f.name} must be at least {LEAST.get(f.name, 1)}, got {value}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates must be at least one, above 0, got {self.learning_rates}")
        if list(self.learning_rates) != sorted(set(self.learning_rates)):
            raise UserError(f"learning_rates must rise, got {self.learning_rates}")
        if self.batch_size % 2:
            raise UserError(f"batch_size must be even, as pictures are mixed in pairs, got {self.batch_size}")

    def tuning(self, rows: Sequence[str]) -> list[Job]:
        """The runs that learning rates are chosen by; none where there is one only."""
        if len(self.learning_rates) == 1:
            return []
        return [Job(row, rate, 0, True) for row in rows for rate in self.learning_rates]

    def further(self, tried: Mapping[float, float]) -> float | None:
        """What a row tries next, whose learning rates had these scores: beyond its best one, if that is at an end."""
        return further_rate(tried, len(self.learning_rates), self.further_rates)

    def within(self, budget: float, seconds: Callable[[Self], float]) -> Self:
        """With as many epochs as take no more than the budget by an estimate; not more than now."""
        shorter = (
            replace(
                self,
                epochs=n,
                tuning_epochs=min(self.tuning_epochs, max(2, round(self.tuning_epochs * n / self.epochs))),
            )
            for n in range(self.epochs, 0, -1)
        )
        return next((plan for plan in shorter if seconds(plan) <= budget or plan.epochs <= FEWEST), self)


def choose_rows(names: Sequence[str]) -> list[str]:
    """Raises UserError. None: all."""
    for name in names:
        if name not in ROWS:
            raise UserError(f"rows must be of {', '.join(ROWS)}, got {name}")
    return list(dict.fromkeys(names)) or list(ROWS)
