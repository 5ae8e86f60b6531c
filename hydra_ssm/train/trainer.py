"""transformers' Trainer for packed masked language modelling, with whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..bench.machine import device_name
from ..encoder import undecayed
from ..text import HydraForMaskedLM
from ..text.collators import IGNORED, MaskedLMCollator
from .baseline import Score
from .distributed import Team, deal_out, is_sharded, several, shard, whole_optimizer, whole_weights
from .dropout import by_row
from .errors import Diverged
from .flops import peak, step_cost
from .parts import Batches, Parts, dealt
from .recipe import Recipe
from .rows import EvaluationRows, TrainingRows
from .whole import WholeCheckpoints

WARM_UP, LAST = 0.06, 0.02  # of the steps; of the peak learning rate


def in_bf16(recipe: Recipe) -> bool:
    """Whether products of matrices are computed in bfloat16 here."""
    return recipe.precision == "bf16" or (
        recipe.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )


def arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """The paper's recipe with the numbers of this run."""
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not cuda and (several() or in_bf16(recipe)),  # otherwise Trainer takes several processes for strangers
        log_level_replica="error",
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
        bf16=in_bf16(recipe),
        logging_nan_inf_filter=False,  # it would log them as 0
        logging_steps=max(1, min(recipe.steps // 100, 50)),
        eval_strategy="steps",
        eval_steps=recipe.evaluate_every,
        save_strategy="steps",
        save_steps=recipe.save_every,
        seed=recipe.seed,
        dataloader_pin_memory=cuda,
        dataloader_num_workers=2 if cuda else 0,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    args.lr_scheduler_kwargs = {
        "num_decay_steps": recipe.steps - args.get_warmup_steps(recipe.steps),
        "decay_type": "linear",
        "min_lr_ratio": LAST,
    }
    args._n_gpu = min(args.n_gpu, 1)  # a packed row cannot be split over the devices of one process
    return args


class EvaluationInterrupted(Exception):
    """An evaluation that was asked to stop."""


class MaskedLMTrainer(WholeCheckpoints):
    """Trainer for rows that have their order, in any number of processes with the same result.

    Adds masked accuracy, evaluation by token, whole checkpoints that any number of processes reads, and dropout that
    follows from the row.

    asked: whether the training is to stop; all processes ask together, and get the same answer.
    """

    def __init__(
        self,
        model: HydraForMaskedLM,
        args: TrainingArguments,
        train: tuple[TrainingRows, MaskedLMCollator],
        held_out: tuple[EvaluationRows, MaskedLMCollator],
        *,
        team: Team = Team(),  # noqa: B008 - a value
        recipe: Recipe | None = None,
        asked: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        super().__init__(model, args, train[1], train[0], held_out[0], **options)
        self.remove_callback(PrinterCallback)  # of what is not a terminal's; ProgressBar says it in words
        self.net, self.rows, self.team, self.asked = model, train[0], team, asked
        self.held_out_rows, self.held_out_collator = held_out
        self.batches, self.held_out_batches = (Batches(c, c.mask_token) for c in (train[1], held_out[1]))
        self.draw = by_row(model, model.config.hidden_size)
        self.cost, self.peak = step_cost(model), peak(device_name(args.device), args.bf16)
        self.sharded = recipe is not None and recipe.sharding == "fsdp2" and team.size > 1
        model.model.encoder.gradient_checkpointing = recipe is not None and recipe.activation_checkpointing
        if recipe is not None and recipe.compile:
            _compile(model)
        self._gathered: dict[str, Any] = {}
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._right: Tensor | int = 0
        self._hidden = self._tokens = 0
        self._pairs: Tensor | int = 0
        self._since = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader:
        """Of this process's part of each step, as the data are: Accelerate has no part in it."""
        args = self.args
        size = self.rows.total // args.max_steps
        parts = Parts(args.max_steps, size, args.gradient_accumulation_steps, self.team.rank, self.team.size)
        return DataLoader(
            self.rows,
            batch_sampler=parts,
            collate_fn=self.batches,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer calls this once the weights are there, and before it wraps the model."""
        if self.sharded and not is_sharded(self.net):
            self.net.to(self.args.device)  # type: ignore[arg-type]
            self.accelerator.prepare_model(self.net, device_placement=False, evaluation_mode=True)  # autocast alone
            shard(self.net, self.net.model.encoder.layers, self.team, self.args.device, self.args.bf16)
        return super().create_optimizer(*(() if model is None else (model,)))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but biases, norms, and the numbers that decays and skips are made of."""
        kept = undecayed(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in kept]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss; counts right predictions on the way."""
        self.draw.words = inputs.pop("words", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            right, hidden = _right(outputs.logits, inputs["labels"])
            self._right, self._hidden = self._right + right, self._hidden + hidden
            self._tokens += inputs["labels"].numel()
            self._pairs = self._pairs + _pairs(inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training loss the masked accuracy and, since the last one, tokens per second and utilisation."""
        if "loss" in logs and self._tokens:
            right, hidden, tokens, pairs = self.team.sum(
                [float(self._right), self._hidden, self._tokens, float(self._pairs)]
            )
            seconds = time.perf_counter() - self._since
            logs["masked_accuracy"] = right / max(hidden, 1)
            logs["tokens_per_second"] = tokens / seconds
            if self.cost and self.peak:
                flop = self.cost(tokens, pairs, hidden)
                logs["model_flop_utilisation"] = flop / seconds / (self.peak * self.team.size)
            self._reset_counts()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0)):
                raise self._diverged(f"its {name} is {logs[name]}")
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Loss and masked accuracy, each the mean over hidden tokens, of the held-out rows.

        Nothing where it is asked to stop: the training is saved and stops, too. Raises EvaluationInterrupted instead in
        the evaluation that a resumed run begins with: Trainer would train a step before it stops.
        """
        started = time.perf_counter()
        begins, self.args.eval_on_start = self.args.eval_on_start, False
        try:
            score = self.score()
        except EvaluationInterrupted:
            if begins:
                raise  # the checkpoint that it was resumed from is that of this step
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {"eval_loss": score.loss, "eval_masked_accuracy": score.accuracy}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started  # no part of the training's speed
        return metrics

    @torch.no_grad()
    def score(self) -> Score:
        """How well the model predicts the held-out rows, in the precision that it is trained in.

        Raises EvaluationInterrupted.
        """
        training = self.net.training
        self.net.eval()
        self.net.training = True  # the layers below evaluate; the head decodes what is to be predicted and no more
        try:
            with self.accelerator.autocast():
                return self._score()
        finally:
            self.net.train(training)

    def _score(self) -> Score:
        """Each process computes its part of every batch; where the model is in parts, all go through it together."""
        loss, right, tokens = 0.0, 0, 0
        size, count = self.args.per_device_eval_batch_size * self.team.size, len(self.held_out_rows)
        for start in range(0, count, size):
            if self.asked():
                raise EvaluationInterrupted
            own = dealt(range(start, min(start + size, count)), self.team.size)[self.team.rank]
            inputs = self._prepare_inputs(self.held_out_batches([self.held_out_rows[i] for i in own]))
            self.draw.words = inputs.pop("words", None)
            outputs = self.net(**inputs, num_items_in_batch=1)
            found, hidden = _right(outputs.logits, inputs["labels"])
            loss, right, tokens = loss + float(outputs.loss), right + int(found), tokens + hidden
        loss, correct, every = self.team.sum([loss, right, tokens])
        return Score(loss / every, correct / every, int(every))

    def _diverged(self, reason: str) -> Diverged:
        return Diverged(self.state.global_step, reason, self.args.learning_rate)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As one process would write it, by the first one."""
        broken = any(not _local(p).isfinite().all() for p in self.net.parameters())
        if self.team.most(broken):
            raise self._diverged("its weights are no longer finite")
        if is_sharded(self.net):
            assert self.optimizer is not None
            self._gathered = {"model": whole_weights(self.net), "optimizer": whole_optimizer(self.optimizer)}
        save = super()._save_checkpoint
        try:
            self.team.first_does(lambda: save(model, trial))
        finally:
            self._gathered = {}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, self._gathered.get("model", state_dict))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._gathered:
            return super()._save_optimizer_and_scheduler(output_dir)
        assert self.lr_scheduler is not None
        torch.save(self._gathered["optimizer"], Path(output_dir) / "optimizer.pt")
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.net):
            return super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        deal_out(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True), self.optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing that is drawn while training depends on what was drawn before."""

    def _load_rng_state(self, checkpoint: str | None) -> None: ...

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None here: Trainer's estimate takes every parameter for a matrix. See flops.py."""
        return 0

    def store_flos(self) -> None: ...

    def whole_model(self) -> dict[str, Tensor] | None:
        """Weights for save_pretrained, where the model has them in parts. All processes call it."""
        return whole_weights(self.net) if is_sharded(self.net) else None


def _compile(model: HydraForMaskedLM) -> None:
    """Norms, residuals, dropout and feed-forward networks of each layer; mixers have kernels of their own."""
    for layer in model.model.encoder.layers:
        layer.mixer.forward = torch.compiler.disable(layer.mixer.forward)  # type: ignore[method-assign, union-attr]
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]


class GivenIntervals(TrainerCallback):
    """Trainer goes on with the intervals of its checkpoint; those of a resumed run may be others.

    An evaluation that a signal ended is the first that a resumed run does.

    evaluate_first: also before the first step.
    """

    def __init__(self, evaluate_first: bool = False) -> None:
        self.evaluate_first = evaluate_first

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)
        step = state.global_step
        due = step % state.eval_steps == 0 or step == state.max_steps if step else self.evaluate_first
        args.eval_on_start = bool(due) and not evaluated(state)


def evaluated(state: TrainerState) -> bool:
    """Whether it was, after the step that it is at."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


class EvaluateAtTheEnd(TrainerCallback):
    """Trainer saves after the last step, but evaluates there only where the interval meets it."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def _right(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(how many are predicted, how many there are) of the labelled tokens, whose logits are (n, vocabulary)."""
    hidden = labels[labels != IGNORED]
    return (logits.detach().argmax(-1) == hidden).sum(), len(hidden)


def _pairs(inputs: dict[str, Tensor]) -> Tensor | int:
    """Pairs of tokens that are in one document."""
    starts, ids = inputs.get("cu_seqlens"), inputs["labels"]
    return ids.numel() * ids.shape[1] if starts is None else starts.diff().long().square().sum()


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
