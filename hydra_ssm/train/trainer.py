"""transformers' Trainer for packed masked language modelling, with whole checkpoints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..mixer import MatrixMixer
from ..text import HydraForMaskedLM
from ..text.collators import IGNORED, MaskedLMCollator
from .baseline import Score
from .errors import Diverged, UserError
from .recipe import Recipe
from .rows import EvaluationRows, TrainingRows
from .whole import WholeCheckpoints

WARM_UP, LAST = 0.06, 0.02  # of the steps; of the peak learning rate


def arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The paper's recipe with the numbers of this run."""
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size // recipe.accumulate,
        gradient_accumulation_steps=recipe.accumulate,
        per_device_eval_batch_size=max(1, 4096 // recipe.length),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=1.0,
        warmup_steps=WARM_UP,
        lr_scheduler_type="warmup_stable_decay",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        logging_nan_inf_filter=False,  # it would log them as 0
        logging_steps=max(1, min(recipe.steps // 100, 50)),
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        seed=recipe.seed,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    args.lr_scheduler_kwargs = {
        "num_decay_steps": recipe.steps - args.get_warmup_steps(recipe.steps),
        "decay_type": "linear",
        "min_lr_ratio": LAST,
    }
    if args.world_size > 1:
        raise UserError(f"pretrain runs in one process, got {args.world_size}")
    args._n_gpu = min(args.n_gpu, 1)  # a packed row cannot be split over the devices of one process
    return args


class MaskedLMTrainer(WholeCheckpoints):
    """Adds masked accuracy, evaluation by token and whole checkpoints; takes its rows in the order that they have."""

    def __init__(
        self,
        model: HydraForMaskedLM,
        args: TrainingArguments,
        train: tuple[TrainingRows, MaskedLMCollator],
        held_out: tuple[EvaluationRows, MaskedLMCollator],
        **options: Any,
    ) -> None:
        super().__init__(model, args, train[1], train[0], held_out[0], **options)
        self.remove_callback(PrinterCallback)  # of what is not a terminal's; ProgressBar says it in words
        self.net, self.rows = model, train[0]
        self.held_out_rows, self.held_out_collator = held_out
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._right: Tensor | int = 0
        self._hidden = self._tokens = 0
        self._since = time.perf_counter()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.rows)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms, and the numbers that decays and skips are made of."""
        mixers = [(path, m) for path, m in model.named_modules() if isinstance(m, MatrixMixer)]
        kept = {f"{path}.{name}" for path, mixer in mixers for name in mixer.no_weight_decay()}
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; counts right predictions on the way."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            right, hidden = _right(outputs.logits, inputs["labels"])
            self._right, self._hidden = self._right + right, self._hidden + hidden
            self._tokens += inputs["labels"].numel()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training loss the masked accuracy and tokens per second since the last one."""
        if "loss" in logs and self._hidden:
            logs["masked_accuracy"] = float(self._right) / self._hidden
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._since)
            self._reset_counts()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise self._diverged(f"its {name} is {logs[name]}")
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Loss and masked accuracy, each the mean over hidden tokens, of the held-out rows."""
        started = time.perf_counter()
        score = self.score()
        metrics = {"eval_loss": score.loss, "eval_masked_accuracy": score.accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # no part of the training's speed
        return metrics

    @torch.no_grad()
    def score(self) -> Score:
        """How well the model predicts the held-out rows, in the precision that it is trained in."""
        with self.accelerator.autocast():
            return self._score()

    def _score(self) -> Score:
        loss, right, tokens = 0.0, 0, 0
        training = self.net.training
        self.net.eval()
        size, rows = self.args.per_device_eval_batch_size, self.held_out_rows
        for start in range(0, len(rows), size):
            batch = self.held_out_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            chosen = labels != IGNORED
            logits = self.net.predict(
                self.net.model(**inputs).last_hidden_state[chosen]
            )  # of all would fill the memory
            loss += float(F.cross_entropy(logits.float(), labels[chosen], reduction="sum"))
            found, hidden = _right(logits, labels)
            right, tokens = right + int(found), tokens + hidden
        self.net.train(training)
        return Score(loss / tokens, right / tokens, tokens)

    def _diverged(self, reason: str) -> Diverged:
        return Diverged(self.state.global_step, reason, self.args.learning_rate)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not all(p.isfinite().all() for p in self.net.parameters()):
            raise self._diverged("its weights are no longer finite")
        super()._save_checkpoint(model, trial)


class EvaluateAtTheEnd(TrainerCallback):
    """Trainer saves after the last step, but evaluates there only where the interval meets it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def _right(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(how many are predicted, how many there are) of the labelled tokens, whose logits are (n, vocabulary)."""
    hidden = labels[labels != IGNORED]
    return (logits.detach().argmax(-1) == hidden).sum(), len(hidden)
