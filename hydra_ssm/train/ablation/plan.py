"""What an ablation compares, and on what: the settings that all of its runs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..errors import UserError
from ..plans import known_settings
from ..recipe import Recipe

SIZES: dict[str, dict[str, Any]] = {
    # Python's language reference, all rows and two seeds: minutes on 2 cores.
    "small": {
        "layers": 2, "d_model": 64, "headdim": 8, "d_state": 8, "length": 32, "vocab_size": 1024, "batch_size": 16,
        "steps": 150, "learning_rate": 5e-3, "mask_rate": 0.3, "held_out_rows": 512,
    },
    # The paper's depth and length, 7M parameters: for one GPU, on which a run takes a fraction of a minute.
    "medium": {
        "layers": 12, "d_model": 256, "headdim": 64, "d_state": 16, "length": 128, "vocab_size": 8192,
        "batch_size": 128, "steps": 1000, "learning_rate": 1e-3, "mask_rate": 0.3, "held_out_rows": 2048,
    },
    # The paper's Table 2: 70M parameters, 12.6 billion tokens.
    "paper": {
        "layers": 12, "d_model": 768, "headdim": 64, "d_state": 64, "length": 128, "vocab_size": 30522,
        "batch_size": 4096, "accumulate": 16, "steps": 24_000, "learning_rate": 5e-4, "mask_rate": 0.15,
        "clip": 0.0, "held_out_rows": 4096,
    },
}  # fmt: skip
SEEDS = {"small": (0, 1)}  # by size
EVALUATIONS = 10  # of a run, the last one after its last step


@dataclass(frozen=True)
class Plan:
    """Settings of an ablation, the same for every row and seed of it.

    Args:
        size: the name of the preset that they began with.
        sources, held_out, tokenizer, vocab_size, length, batch_size, accumulate, steps, learning_rate, mask_rate: as in
            `Recipe`; a row of text has exactly `length` tokens.
        unmatched: state sizes and inner widths as in the released code's comparison, instead of equal ones.
        layers, d_model, headdim: of each model.
        d_state: N of each class: state size, rank, features of a query and a key.
        clip: largest norm of the gradients; 0 for any.
        held_out_rows: evaluate on so many rows at most.
        save_after: seconds between checkpoints, more where saving would take over a twentieth of the time.

    Raises:
        UserError: a setting out of its range.
    """

    size: str
    layers: int
    d_model: int
    headdim: int
    d_state: int
    length: int
    vocab_size: int
    batch_size: int
    steps: int
    learning_rate: float
    mask_rate: float
    held_out_rows: int
    accumulate: int = 1
    clip: float = 1.0
    save_after: float = 60.0
    unmatched: bool = False
    sources: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    tokenizer: str | None = None

    @classmethod
    def of(cls, size: str, given: Mapping[str, Any]) -> Self:
        """The plan of a size, with what is given in place of its numbers."""
        if size not in SIZES:
            raise UserError(f"a size must be one of {', '.join(SIZES)}, got {size!r}")
        return cls(size, **{**SIZES[size], **known_settings(cls, given)})

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "headdim", "d_state", "held_out_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("clip", "save_after"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if (2 * self.d_model) % self.headdim:
            raise UserError(f"headdim must divide 2 * d_model = {2 * self.d_model}, got {self.headdim}")
        self.recipe(0)

    @property
    def heads(self) -> int:
        """Of a layer that is twice as wide within as without, as the paper's are."""
        return 2 * self.d_model // self.headdim

    def recipe(self, seed: int) -> Recipe:
        """Of one run. Raises UserError."""
        return Recipe(
            f"ablation {self.size}", self.sources, self.held_out, tokenizer=self.tokenizer, vocab_size=self.vocab_size,
            length=self.length, batch_size=self.batch_size, accumulate=self.accumulate, steps=self.steps,
            learning_rate=self.learning_rate, weight_decay=0.02, mask_rate=self.mask_rate, seed=seed,
        )  # fmt: skip

    @property
    def setting(self) -> str:
        """What was equal between the rows, in a few words that stand in every output."""
        if self.unmatched:
            return "released setting: states and parameters NOT matched"
        return f"matched: state {self.d_state} in every class, equal parameters"
