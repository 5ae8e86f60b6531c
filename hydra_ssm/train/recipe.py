"""What a pretraining run is made of: every setting, written into the run's folder."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from .data.shards import is_shards
from .errors import UserError
from .sources import TEXT_COLUMN
from .start import preset_of

# A small text on a CPU: about three minutes on 2 cores. Other presets take the paper's numbers, the defaults below.
SMALL = {
    "vocab_size": 2048,
    "batch_size": 4,
    "steps": 1000,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
}
MOST = 2**32 - 1  # of NumPy's seeds; no other number comes near
MOST_LOST = 1000  # steps between checkpoints and between evaluations: half an hour of the paper's
CHOICES = {
    "sharding": ("ddp", "fsdp2"),
    "precision": ("auto", "bf16", "fp32"),
    "report_to": ("tensorboard", "wandb"),
}
# How a run is computed and watched, not what: a run may go on with other ones.
HOW = ("accumulate", "sharding", "compile", "activation_checkpointing", "report_to", "save_every")
SEVERAL = ("sources", "held_out", "report_to")
BY_PRESET: dict[str, dict[str, Any]] = {"hydra-tiny": SMALL, "bert-tiny": SMALL}


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. The defaults are the paper's for its Table 4; `of` takes the preset's.

    Args:
        preset: the model's size; None for what `model` has, or any size.
        model: a folder that pretrain, convert or save_pretrained wrote, or a name on the Hugging Face Hub: the run
            begins with its weights and keeps its tokenizer. None for new weights.
        sources: text files, folders or data set names; none for Python's language reference.
        held_out: the same, to evaluate on; none for a twentieth of the sources.
        column: of a data set, that holds its texts.
        tokenizer: a folder or vocab.txt; None to train one of at most `vocab_size` tokens.
        length: most tokens of a row, and of a piece of a document with its [CLS] and [SEP].
        batch_size: rows in a step, computed in `accumulate` parts of one size.
        weight_decay: torch's, which the learning rate multiplies; the paper's is decoupled, 1e-5 a step.
        mask_rate: of the tokens in training; evaluation hides 0.15.
        save_every, evaluate_every: steps; `of` takes a tenth and a fifth of all, 1,000 at most.
        evaluation_tokens: most tokens of held-out rows, evenly spread, that an evaluation reads; 0 for all of them.
        sharding: of several processes: ddp, each holds the whole model; fsdp2, each holds a part of it.
        precision: of the matrix products: bf16, fp32, or auto, which is bf16 where a GPU computes with it.
        compile: each layer, by torch.compile.
        activation_checkpointing: compute each layer once more for its gradient instead of keeping what it needs.
        report_to: tensorboard, wandb, both or none.

    Raises:
        UserError: a setting out of its range.
    """

    preset: str | None
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
    evaluation_tokens: int = 1 << 20
    seed: int = 0
    sharding: str = "ddp"
    precision: str = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    report_to: tuple[str, ...] = ("tensorboard",)
    model: str | None = None

    @classmethod
    def of(cls, preset: str | None = None, *, tokens: int | None = None, **given: Any) -> Self:
        """The recipe of a preset, with what is given in place of its numbers.

        Args:
            preset: None for the one that has the sizes of `model`; of other sizes, the numbers are the paper's.
            tokens: train until at least so many were read, in full rows; instead of steps.

        Raises:
            UserError: also where `model` is needed and cannot be read, or a vocabulary's size is given for nothing.
        """
        _check_vocabulary(given)
        if preset is None and given.get("model") is not None:
            preset = preset_of(given["model"])
        settings = {**BY_PRESET.get(preset or "", {}), **given}
        if tokens is not None:
            settings["steps"] = _steps(cls, tokens, settings, "steps" in given)
        steps = settings.get("steps", cls.steps)
        every = {"save_every": max(1, steps // 10), "evaluate_every": max(1, steps // 5)}
        return cls(preset, **{name: min(number, MOST_LOST) for name, number in every.items()} | settings)

    def __post_init__(self) -> None:
        if self.preset is None and self.model is None:
            raise UserError("a run needs a preset or a model to begin with, got neither")
        # [CLS], a token, [SEP]; five special tokens and another
        least = {"length": 3, "vocab_size": 6, "seed": 0, "evaluation_tokens": 0}
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
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            for one in value if name in SEVERAL else (value,):
                if one not in choices:
                    raise UserError(f"{name} must be one of {', '.join(choices)}, got {one}")
        if self.batch_size % self.accumulate:
            raise UserError(f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}")

    def going_on(self, given: Mapping[str, Any], out: object) -> Self:
        """The recipe with what is given, for the run in `out`. Raises UserError where that would change its result."""
        given = dict(given)
        if (tokens := given.pop("tokens", None)) is not None:
            given["steps"] = _steps(type(self), tokens, asdict(self), "steps" in given)
        for name, value in given.items():
            if name not in HOW and getattr(self, name) != value:
                more = self._longer(value, out) if name == "steps" and value > self.steps else ""
                raise UserError(f"{name} is {getattr(self, name)} in the run that goes on in {out}, got {value}{more}")
        return replace(self, **given)

    def _longer(self, steps: int, out: object) -> str:
        """What to do instead of more steps."""
        words = ["hydra-ssm", "pretrain", *self.sources, "--model", str(out), "--seed", str(self.seed + 1)]
        return (
            f": a run of {steps} has had other learning rates all the way. When this one has ended, train its model "
            f"further, by a schedule of its own: {shlex.join(words)} --steps {steps - self.steps} --out NEW"
        )

    def to_json(self) -> str:
        """All settings."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            found: dict[str, Any] = json.loads(text)
            return cls(**found | {name: tuple(found[name]) for name in SEVERAL if name in found})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the settings of a run: {error}") from None


def _check_vocabulary(given: Mapping[str, Any]) -> None:
    """A vocabulary's size is for a tokenizer that is trained."""
    size, shards = given.get("vocab_size"), [source for source in given.get("sources", ()) if is_shards(source)]
    if size is None:
        return
    if given.get("model") is not None:
        raise UserError(f"a model keeps its tokenizer, vocab_size = {size} is for a new one: leave out --vocab-size")
    if shards:
        raise UserError(
            f"shards have a tokenizer, vocab_size = {size} is for a new one: leave out --vocab-size, or prepare the "
            f"text again with hydra-ssm data prepare ... --vocab-size {size}"
        )
    if given.get("tokenizer") is not None:
        raise UserError(
            f"vocab_size = {size} is for a tokenizer that is trained, got one, {given['tokenizer']}: leave out "
            "--vocab-size, or --tokenizer"
        )


def _steps(recipe: type[Recipe], tokens: int, settings: Mapping[str, Any], given: bool) -> int:
    if given:
        raise UserError("steps and tokens both say how long to train: give one of them")
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    size = {name: int(settings.get(name, getattr(recipe, name))) for name in ("batch_size", "length")}
    return -(-tokens // max(1, size["batch_size"] * size["length"]))
