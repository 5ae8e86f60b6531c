"""Fine-tuning of one model on one set of examples, by transformers' Trainer: what GLUE and users' data share."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ... import text as _registers  # noqa: F401 - Hydra, with the Auto classes
from ...encoder import undecayed
from ...text.collators import IGNORED
from ...text.inference import UNREADABLE
from ...text.messages import quiet
from ...text.tokenizer import load_tokenizer
from ..errors import UserError
from ..whole import WholeCheckpoints
from .data import Examples

WARM_UP = 0.06  # of the steps
SHORTEST = 5  # tokens of an example: [CLS] one [SEP] other [SEP]
TOGETHER = 1000  # texts that are tokenised at once
TOKENS = 16384  # of a batch that is predicted
HEADS = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}


@dataclass(frozen=True)
class Recipe:
    """AdamW (0.9, 0.98), warm-up over 6 % of the steps, then linearly to 0, gradients clipped at 1.

    Args:
        weight_decay: decoupled: what a step at the highest learning rate takes off.
        length: most tokens of an example; the longer text of a pair is cut first.
        seed: of the new head, the order of the examples and the dropout.
    """

    learning_rate: float
    weight_decay: float
    epochs: float
    batch_size: int
    length: int = 256
    seed: int = 0


class Encoded(Dataset):
    """Examples as token numbers, labels beside them; shorter rows need less memory than they would padded.

    cut: how many examples had more tokens than `length`.
    """

    cut = 0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, examples: Examples, length: int) -> None:
        self.labels, self.ids, self.types = examples.labels, [], []
        for start in range(0, len(examples), TOGETHER):
            part = slice(start, start + TOGETHER)
            second = None if examples.second is None else examples.second[part]
            found = tokenizer(
                examples.first[part], second, truncation=True, max_length=length, return_token_type_ids=True
            )
            self.ids += [np.array(row, np.int32) for row in found["input_ids"]]
            self.types += [np.array(row, np.int8) for row in found["token_type_ids"]]
            self._count_cut(found)

    def _count_cut(self, found: BatchEncoding) -> None:
        self.cut += sum(bool(encoding.overflowing) for encoding in found.encodings or ())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        labels = {} if self.labels is None else {"labels": self.labels[i]}
        return {"input_ids": self.ids[i], "token_type_ids": self.types[i], **labels}


class Padded:
    """Lays examples beside each other, padded on the right to the longest."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, token_type_ids and attention_mask (rows, longest), and labels (rows,) or of tokens as those."""
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": _stack(ids, self.pad),
            "token_type_ids": _stack([row["token_type_ids"] for row in rows], 0),
            "attention_mask": _stack([np.ones_like(row) for row in ids], 0),
        }
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            whole = _stack(labels, IGNORED) if isinstance(labels[0], list | np.ndarray) else torch.tensor(labels)
            batch["labels"] = whole
        return batch


def _stack(rows: Sequence[Any], filler: int) -> Tensor:
    """(rows, longest) int64."""
    out = np.full((len(rows), max(map(len, rows))), filler, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


class NotFinite(Exception):
    """The training has diverged: when, and what is no number."""


class FineTuner(WholeCheckpoints):
    """Trainer, with no decay on what Hydra's decays and skips are made of, and no training on that is not finite."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms, and the numbers that decays and skips are made of."""
        kept = undecayed(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def fit(self, checkpoint: Path | None = None) -> None:
        """Train, from a checkpoint if there is one. Raises NotFinite."""
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        assert self.model is not None
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise NotFinite(f"by step {self.state.global_step}, its weights are no longer finite")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Raises NotFinite where the loss or the gradients are no longer."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise NotFinite(f"by step {self.state.global_step}, its {name} is {logs[name]}")
        super().log(logs, start_time)


def load_model(folder: str | Path, head: str, seed: int, **changes: Any) -> PreTrainedModel:
    """A model of a folder with a head for the task, new where the folder has none of that size.

    Args:
        head: sequence or token.
        changes: of its configuration: num_labels, id2label, problem_type, ...

    Raises UserError where the folder holds no model, or not all weights of its encoder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} must hold a model, as pretrain or save_pretrained write it, it has no config.json")
    set_seed(seed)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), **changes)
            found: Any = HEADS[head].from_pretrained(
                str(folder), config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except UNREADABLE as error:
        raise UserError(f"{folder} holds no model that can be read: {str(error).splitlines()[0]}") from error
    model, report = found
    inner = f"{model.base_model_prefix}."
    lost = [name for name in report["missing_keys"] if name.startswith(inner) and "pooler" not in name]
    lost += [name for name, *_ in report["mismatched_keys"] if name.startswith(inner)]
    if lost:
        raise UserError(f"{folder} must hold all weights of its encoder, it lacks {min(lost)}, of {len(lost)} in all")
    return model


def load_words(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Raises UserError."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} must be a folder with a model, as pretrain or save_pretrained write it, it is none")
    try:
        with quiet():
            return load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} must hold the model's tokenizer: {error}") from error


def longest(model: PreTrainedModel, length: int) -> int:
    """The tokens that an example may have, where the model has learned positions too."""
    most = json.loads(model.config.to_json_string(use_diff=False)).get("max_position_embeddings", -1)
    return min(length, most) if most > 0 else length


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Encoded,
    recipe: Recipe,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> FineTuner:
    """Ready to train; `folder` is for checkpoints."""
    with quiet():
        trainer = FineTuner(
            model, arguments(recipe, folder), Padded(tokenizer.pad_token_id or 0), train, callbacks=callbacks
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The recipe in transformers' words."""
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=max(1, TOKENS // recipe.length),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay / recipe.learning_rate,  # torch multiplies it by the learning rate
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        warmup_steps=WARM_UP,
        lr_scheduler_type="linear",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        logging_nan_inf_filter=False,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        seed=recipe.seed,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    args._n_gpu = min(args.n_gpu, 1)  # tasks run beside each other, each on one device
    return args


def predict(trainer: FineTuner, rows: Encoded) -> NDArray[np.floating]:
    """The model's outputs for each row, (rows, outputs) or of tokens (rows, longest, outputs), in their order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows.ids[i]))  # alike lengths together: little padding
    some = Some(rows, order)
    found = trainer.predict(some).predictions  # type: ignore[arg-type]
    outputs = np.empty_like(found)
    outputs[order] = found
    return outputs.astype(np.float64)


class Some(Dataset):
    """Rows in another order, without their labels."""

    def __init__(self, rows: Encoded, order: Sequence[int]) -> None:
        self.rows, self.order = rows, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[self.order[i]]
        return {name: value for name, value in row.items() if name != "labels"}
