"""What the comparison is made of: the two models, the budget of each part, and the runs that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from ..errors import UserError
from ..plans import known_settings

MODELS = ("hydra", "bert")
TEXTS = ("books", "wikitext")  # what is held out; norm and rate are chosen by the first
NORMS = ("post", "pre")  # after each branch's sum, as in both papers, or before the branch
DECAY = 1e-5  # what a step at the highest learning rate takes off the weights, as in the paper
GOING_ON = 1_000_000  # above every seed
WHOLE_TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "RTE")


@dataclass(frozen=True)
class Plan:
    """Settings of a comparison.

    Args:
        hydra, bert: presets, of equal parameters.
        length: tokens of a row, [CLS] and [SEP] included.
        batch_tokens: of a step, the same at every length.
        norms: places of the norm that both models try; see `HydraConfig`.
        rates: peak learning rates that both models try with each of them, on `rate_tokens` each.
        further_rates: most that a model tries beyond them with a norm, each twice the highest or half the lowest, as
            long as that is the best one.
        tokens: of a pretraining run.
        seeds: of the pretraining; the first one's models go on to the tasks, and to the longer rows unless they are
            on another machine.
        lengths, length_tokens: the models go on with rows of these lengths, on so many tokens each.
        length_rate: the peak of that, as a share of the best rate; the norm is that of the model.
        evaluations: of a whole run, the last one after its last step; 4 at most of the shorter ones.
        evaluation_tokens: most tokens of each held-out text, evenly spread, that it is evaluated on on the way; after
            its last step it is evaluated on all.
        tasks, task_seeds, task_batch: of GLUE; no tasks for none.
        save_after: seconds between checkpoints, more where saving would take over a twentieth of the time.

    Raises:
        UserError: a setting out of its range.
    """

    hydra: str = "hydra-medium"
    bert: str = "bert-medium"
    length: int = 128
    batch_tokens: int = 16_384
    norms: tuple[str, ...] = NORMS
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    further_rates: int = 2
    rate_tokens: int = 30_000_000
    tokens: int = 100_000_000
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    length_tokens: int = 10_000_000
    length_rate: float = 0.5
    mask_rate: float = 0.30
    evaluations: int = 20
    evaluation_tokens: int = 1 << 18
    tasks: tuple[str, ...] = WHOLE_TASKS
    task_seeds: tuple[int, ...] = (0, 1, 2)
    task_batch: int = 32
    save_after: float = 60.0

    def __post_init__(self) -> None:
        for length in (self.length, *self.lengths):
            if length < 3 or self.batch_tokens % length:
                raise UserError(
                    f"lengths must be at least 3 and divide batch_tokens = {self.batch_tokens}, got {length}"
                )
        for name in ("rate_tokens", "tokens", "length_tokens"):
            if getattr(self, name) < self.batch_tokens:
                raise UserError(
                    f"{name} must be at least batch_tokens = {self.batch_tokens}, got {getattr(self, name)}"
                )
        for name in ("evaluations", "evaluation_tokens", "task_batch", "length_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.mask_rate <= 1:
            raise UserError(f"mask_rate must be above 0 and at most 1, got {self.mask_rate}")
        if not self.rates or not all(rate > 0 for rate in self.rates) or not self.seeds:
            raise UserError(f"there must be a seed and rates above 0, got {self.seeds} and {self.rates}")
        if not self.norms or set(self.norms) - set(NORMS):
            raise UserError(f"norms must be of {', '.join(NORMS)}, at least one, got {self.norms}")
        if self.further_rates < 0:
            raise UserError(f"further_rates must be at least 0, got {self.further_rates}")
        if not all(0 <= seed < GOING_ON for seed in (*self.seeds, *self.task_seeds)):
            raise UserError(f"seeds must be at least 0 and below {GOING_ON}, got {self.seeds} and {self.task_seeds}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """With what is given in place of its numbers."""
        return cls(**known_settings(cls, given))


class Choice(NamedTuple):
    """What a model is trained with after both have tried the same."""

    norm: str
    rate: float


@dataclass(frozen=True)
class Run:
    """One training of one model.

    Args:
        stage: rate, tokens (all of them), length, or seconds (as many as the slower model took).
        norm: one of `NORMS`.
        start: the run that it goes on from.
    """

    stage: str
    model: str
    seed: int
    length: int
    steps: int
    norm: str
    rate: float
    start: str | None = None

    @property
    def draw(self) -> int:
        """Seed of rows, masks and dropout: one that goes on from another has batches that this has not seen."""
        return self.seed if self.start is None else self.seed + GOING_ON

    @property
    def name(self) -> str:
        """What tells runs apart."""
        norm = "" if self.norm == NORMS[0] else f"{self.norm}-"
        what = {"rate": f"{norm}{self.rate:g}", "length": f"{self.length}"}.get(self.stage, f"seed-{self.seed}")
        return f"{self.stage}-{self.model}-{what}"


def rate_run(plan: Plan, model: str, norm: str, rate: float) -> Run:
    """A short one, by which norm and rate are chosen."""
    return Run("rate", model, plan.seeds[0], plan.length, plan.rate_tokens // plan.batch_tokens, norm, rate)


def token_runs(plan: Plan, best: Mapping[str, Choice], seed: int) -> list[Run]:
    """Both models on the same tokens, each at its best."""
    steps = plan.tokens // plan.batch_tokens
    return [Run("tokens", model, seed, plan.length, steps, *best[model]) for model in MODELS]


def length_runs(plan: Plan, best: Mapping[str, Choice], seed: int) -> list[Run]:
    """What the models of a seed learn from longer rows, and the shorter ones again to compare with."""
    steps = plan.length_tokens // plan.batch_tokens
    return [
        Run("length", model, seed, length, steps, norm, plan.length_rate * rate, f"tokens-{model}-seed-{seed}")
        for length in plan.lengths
        for model, (norm, rate) in ((model, best[model]) for model in MODELS)
    ]


def seconds_run(plan: Plan, best: Mapping[str, Choice], seed: int, seconds: Mapping[str, float]) -> Run:
    """The faster model once more, on as many tokens as fill the slower one's time."""
    fast, slow = sorted(MODELS, key=seconds.__getitem__)
    steps = int(plan.tokens // plan.batch_tokens * seconds[slow] / seconds[fast])
    return Run("seconds", fast, seed, plan.length, steps, *best[fast])
