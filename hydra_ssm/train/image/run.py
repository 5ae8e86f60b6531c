"""A run of image training: what it trains on, its state, and its way from step to step."""

from __future__ import annotations

import math
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..checkpoints import newest_whole, remove_unfinished
from ..errors import Diverged, Stopped, UserError
from ..workers import stopping
from .baselines import logistic_regression, most_frequent
from .evaluation import autocast, number_of_workers, score
from .folder import ImageFolder
from .loading import Batch, Notes, Pictures, TrainingOrder, loader, normalized, seed_drawing, training_transform
from .processes import Processes
from .progress import Shown
from .report import finish
from .result import create, on_device
from .sources import Part, Parts, open_parts
from .state import load_state, save_state

SAY_EVERY = 1.0  # seconds
ASK_EVERY = 10  # steps: whether a process was told to stop, which all of them must know


def facts(train: Part, held_out: Part, classes: list[str]) -> dict[str, Any]:
    """What the pictures of a run are, to be known again."""
    return {
        "classes": classes, "train_pictures": len(train), "held_out_pictures": len(held_out),
        "train": train.fingerprint(), "held_out": held_out.fingerprint(),
    }  # fmt: skip


class Run:
    """A run from its folder: what it trains on, its state, and the way to its result."""

    def __init__(self, folder: ImageFolder, processes: Processes, parts: Parts | None = None) -> None:
        self.folder, self.processes, self.device = folder, processes, processes.device
        self.recipe = recipe = folder.read_settings()
        self.train_part, self.held_out, self.classes = parts or open_parts(recipe.data, recipe.seed)
        self._check_same()
        torch.manual_seed(recipe.seed)
        model, self.config = create(recipe, len(self.classes))
        self.model = on_device(model, self.device)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True, warmup_power=0.75)
        self.order = TrainingOrder(len(self.train_part), recipe, processes.rank, processes.world)
        self.steps = self.order.steps * recipe.epochs
        criterion = SoftTargetCrossEntropy() if recipe.mixes else LabelSmoothingCrossEntropy(recipe.smoothing)
        self.task = ClassificationTask(self.model, criterion, device=self.device, verbose=False)
        if processes.world > 1:
            self.task.prepare_distributed(device_ids=[self.device.index] if self.device.type == "cuda" else None)
        self._prepare_optimizer()
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(self.classes))
        self.erasing = RandomErasing(recipe.erase, mode="pixel", device=self.device) if recipe.erase else None
        self.workers = number_of_workers(recipe.workers)
        self.done = 0
        self.curve: list[dict[str, float]] = []
        self.notes: Notes = {}
        self.losses: list[Tensor] = []

    def _prepare_optimizer(self) -> None:
        recipe = self.recipe
        fused: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **fused
        )
        self.schedule = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=recipe.epochs, warmup_epochs=recipe.warm_up,
            warmup_lr=recipe.learning_rate / 1000, min_lr=recipe.learning_rate / 100, step_on_epochs=False,
            updates_per_epoch=self.order.steps,
        )[0]  # fmt: skip

    def _check_same(self) -> None:
        """Raises UserError where the pictures are not those that the run began with."""
        before, now = self.folder.read_data(), facts(self.train_part, self.held_out, self.classes)
        if before != now:
            raise UserError(
                f"the pictures of {self.recipe.data} have changed since the run began, from "
                f"{before['train_pictures']:,} to train on to {now['train_pictures']:,}, or in their names: start "
                "again with --overwrite"
            )

    def train(self) -> dict[str, Any] | None:
        """From the newest whole checkpoint, or the start, to the end."""
        if self.processes.first:
            for path in (self.folder.path, self.folder.training, self.folder.checkpoints):
                remove_unfinished(path)  # and brings back what was being replaced, which all are to see
        self.processes.wait()
        self._load(newest_whole(self.folder.checkpoints))
        self.processes.wait()
        asked = threading.Event()
        logs = SummaryWriter(self.folder.tensorboard, purge_step=self.done + 1) if self.processes.first else None
        with stopping(asked) as received, Shown(self.steps, self.done, quiet=not self.processes.first) as shown:
            self.shown, self.logs = shown, logs
            while len(self.curve) < self.recipe.epochs:
                if self.done == (len(self.curve) + 1) * self.order.steps:
                    self._evaluate(asked)
                else:
                    self._epoch(asked)
                if len(self.curve) < self.recipe.epochs and self.processes.any(asked.is_set()):
                    self._save()
                    raise Stopped(self.done, self.steps, received[0] if received else 15, self.folder.path)
        self._check_finite()
        self.notes = self.processes.merged(self.notes)
        if not self.processes.first:
            self.processes.wait()
            return None
        try:
            return finish(self, self._baseline())
        finally:
            if logs is not None:
                logs.close()
            self.processes.wait()

    def _epoch(self, asked: threading.Event) -> None:
        """The rest of the epoch that the run is in; ends early when somebody asks."""
        self.order.epoch, self.order.start = divmod(self.done, self.order.steps)
        pictures = Pictures(self.train_part, training_transform(self.recipe, self.config), training=True)
        save_every = self.recipe.save_every or self.order.steps
        self._since, self._seen = time.perf_counter(), 0
        for batch in loader(pictures, self.order, self.workers):
            self._step(batch)
            if self.done % save_every == 0 or self.done == self.steps:
                self._save()
            ask = self.processes.world == 1 or self.done % ASK_EVERY == 0  # among several the GPU is waited for
            if ask and self.processes.any(asked.is_set()):
                return

    def _step(self, batch: Batch) -> None:
        recipe = self.recipe
        self.notes |= batch.notes
        # All that a step draws: mixing, erasing, what the model drops.
        torch.manual_seed(seed_drawing(recipe.seed, self.done, self.processes.rank, 1))
        self.schedule.step_update(self.done)
        self.optimizer.zero_grad(set_to_none=True)
        parts = list(zip(batch.pixels.chunk(recipe.accumulate), batch.labels.chunk(recipe.accumulate), strict=True))
        loss = torch.zeros((), device=self.device)
        for i, (pixels, labels) in enumerate(parts):
            if i + 1 < len(parts):
                with self.task.no_sync():
                    loss += self._backward(pixels, labels)
            else:
                loss += self._backward(pixels, labels)
        self.optimizer.step()
        self.done += 1
        self.ema.update(self.model, step=self.done + 1)  # its first decays would be 0
        self.losses.append(loss)
        self._tell(len(batch.labels) * self.processes.world)

    def _backward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = normalized(pixels, self.config, self.device)
        target = labels.to(self.device, non_blocking=True)
        if self.erasing is not None:
            x = self.erasing(x)
        if self.recipe.mixes:
            x, target = self.mixup(x, target)
        with autocast(self.device, self.recipe.precision):
            loss = self.task(x, target)["loss"] / self.recipe.accumulate
        loss.backward()
        return loss.detach()

    def _tell(self, pictures: int) -> None:
        """Reads losses from the device now and then alone. Raises Diverged."""
        self._seen += pictures
        self.shown.step(self.done)
        spent = time.perf_counter() - self._since
        if spent < SAY_EVERY and self.done % self.order.steps:
            return
        loss = float(torch.stack(self.losses).mean())
        if not math.isfinite(loss):
            raise Diverged(self.done, f"its loss is {loss}", self.recipe.learning_rate)
        rate, speed = self.optimizer.param_groups[0]["lr"], self._seen / spent
        self.shown.numbers(self.done, loss, rate, speed)
        if self.logs is not None:
            for name, value in (("loss", loss), ("learning_rate", rate), ("pictures_per_second", speed)):
                self.logs.add_scalar(f"train/{name}", value, self.done)
        self.losses.clear()
        self._since, self._seen = time.perf_counter(), 0

    def _evaluate(self, asked: threading.Event) -> None:
        """Both kinds of weights on the held-out pictures; nothing where somebody asks to stop."""
        models, epoch = {"raw": self.model, "averaged": self.ema.module}, len(self.curve) + 1
        scores, notes = score(
            models, self.held_out, self.config, self.device, workers=self.workers, rank=self.processes.rank,
            world=self.processes.world, precision=self.recipe.precision, stop=asked.is_set,
        )  # fmt: skip
        if self.processes.any(asked.is_set()):
            return
        self.notes |= notes
        self.curve.append(
            {"epoch": epoch, "step": self.done, **{f"top1_{name}": s.top1 for name, s in scores.items()},
             **{f"top5_{name}": s.top5 for name, s in scores.items()},
             **{f"loss_{name}": s.loss for name, s in scores.items()}}
        )  # fmt: skip
        self.shown.evaluated(epoch, self.recipe.epochs, scores["raw"], scores["averaged"])
        if self.logs is not None:
            for name, value in self.curve[-1].items():
                self.logs.add_scalar(f"held_out/{name}", value, self.done)

    def _check_finite(self) -> None:
        """Raises Diverged, in all processes."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(self.done, "its weights are no longer finite", self.recipe.learning_rate)

    def _save(self) -> None:
        self._check_finite()
        notes = self.processes.merged(self.notes)
        if self.processes.first:
            save_state(
                self.folder.checkpoints, self.done, self.model, self.ema, self.optimizer,
                done=self.done, curve=self.curve, notes=notes,
            )  # fmt: skip

    def _load(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            progress = load_state(checkpoint, self.device, self.model, self.ema, self.optimizer)
            self.done, self.curve, self.notes = (progress[name] for name in ("done", "curve", "notes"))

    def _baseline(self) -> tuple[str, float]:
        """What a model must be better than."""
        if self.recipe.data is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return "logistic regression on the pixels", logistic_regression(self.train_part, self.held_out)
        return "always the commonest class", most_frequent(self.train_part, self.held_out)
