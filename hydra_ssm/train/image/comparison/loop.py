"""One run: a model, its learning rate and seed, trained from pictures that lie on the device."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ....bench.machine import device_name
from ...checkpoints import SaveTimer, newest_whole, remove, remove_unfinished
from ...plans import read_plan
from ...records import Record, read_json, write_json
from ...replay import replayed
from ...workers import Say, Until
from ..state import load_state, save_state
from .augment import Random, augmented, normalized
from .data import Data
from .models import build
from .plan import Job, Plan

RUNS = "runs"
SAVE_AFTER = 90.0  # seconds
TOGETHER = 1000  # pictures that are evaluated at once

Score = dict[str, float]


def folder_of(out: Path, job: Job) -> Path:
    """Of the checkpoints, while it is under way."""
    return out / RUNS / job.name


def finished(out: Path, job: Job) -> Record | None:
    """The record of a run that has come to its end."""
    return read_json(out / RUNS / f"{job.name}.json")


def failure_of(out: Path, job: Job) -> Path:
    """A file that says how a run failed when it was last tried."""
    return out / RUNS / f"{job.name}.failed"


def failures(out: Path) -> list[Path]:
    """The files of `failure_of` that there are."""
    return sorted((out / RUNS).glob("*.failed"))


def train(out: Path, data: Path, job: Job, until: Until, at_once: int, say: Say) -> Record | None:
    """Go on with a run to its end, and keep its record in a file. None where it had to stop before."""
    if until.over() or finished(out, job):
        return finished(out, job)
    folder = folder_of(out, job)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    gc.collect()  # of the last run, before the next one captures: what it frees then would break the capture
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    run = Run(read_plan(Plan, out), Data(data), job, say)
    run.load(newest_whole(folder))
    timer = SaveTimer(SAVE_AFTER)
    while not run.ended:
        run.one_epoch()
        over = until.over()
        if not run.ended and (over or timer.due):
            timer.begin()
            run.save(folder)
            timer.end()
            if over:
                return None
    record = {**job._asdict(), **run.record(), "at_once": at_once}
    write_json(out / RUNS / f"{job.name}.json", record)
    failure_of(out, job).unlink(missing_ok=True)
    remove(folder)
    return record


class Run:
    """The state of a run, and how it advances by an epoch."""

    def __init__(self, plan: Plan, data: Data, job: Job, say: Say) -> None:
        self.plan, self.job = plan, job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        parts = data.tuning() if job.tuning else (data.train, data.test)
        self.train, self.held_out = (part.to(self.device) for part in parts)
        self.classes = len(data.classes)
        self.epochs = plan.tuning_epochs if job.tuning else plan.epochs
        self.steps = len(self.train) // plan.batch_size  # of an epoch
        torch.manual_seed(job.seed)
        self.model = build(job.row, plan, self.classes, data.facts["size"]).to(self.device)
        self.ema = ModelEmaV3(self.model, decay=plan.ema_decay, use_warmup=True, warmup_power=0.75)
        fused: dict[str, Any] = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizer = create_optimizer_v2(
            self.model, "adamw", lr=job.learning_rate, weight_decay=plan.weight_decay, **fused
        )
        self.schedule = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=self.epochs, warmup_epochs=plan.warm_up * self.epochs,  # type: ignore[arg-type]
            warmup_lr=job.learning_rate / 100, min_lr=job.learning_rate / 100, step_on_epochs=False,
            updates_per_epoch=self.steps,
        )[0]  # fmt: skip
        self.epoch, self.seconds = 0, 0.0
        self.diverged: str | None = None
        self.curve: list[dict[str, float]] = []
        self.step = Step(self.model, SoftTargetCrossEntropy(), lambda told: say(f"{job}: {told}"))

    @property
    def ended(self) -> bool:
        return self.epoch == self.epochs or self.diverged is not None

    def one_epoch(self) -> None:
        """Train on all pictures once; score the weights where it is time."""
        started = time.perf_counter()
        torch.manual_seed(self._key(self.epoch))  # of what the model itself drops
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self._key(self.epoch)))
        losses = [self._one_step(i, index) for i, index in enumerate(self._batches(order))]
        loss = float(torch.stack(losses).mean())
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        if not math.isfinite(loss):
            self.diverged = f"in epoch {self.epoch}, its loss is {loss}"
            return
        scored = self.epoch % self.plan.evaluate_every == 0 or self.epoch == self.epochs
        self.curve.append({"epoch": self.epoch, "loss": loss, **(self.scores() if scored else {})})

    def _batches(self, order: Tensor) -> list[Tensor]:
        size = self.plan.batch_size
        return [part.to(self.device, non_blocking=True) for part in order[: self.steps * size].split(size)]

    def _key(self, epoch: int) -> int:
        return self.job.seed * 100_003 + epoch

    def _one_step(self, i: int, index: Tensor) -> Tensor:
        update = self.epoch * self.steps + i
        self.schedule.step_update(update)
        pictures, labels = self.train.at(index)
        random = Random(self.job.seed, update, self.device)
        x, target = augmented(pictures, labels, self.classes, self.plan.strength, random)
        loss = self.step(x, target)
        self.optimizer.step()
        self.ema.update(self.model, step=update + 2)  # its first decay would be 0 for two steps
        return loss

    @torch.no_grad()
    def scores(self) -> Score:
        """Top-1 and top-5 in per cent of the raw and of the averaged weights."""
        found: Score = {}
        for ending, model in (("", self.model), ("_ema", self.ema.module)):
            model.eval()
            right = torch.zeros(2, device=self.device)
            for part in torch.arange(len(self.held_out), device=self.device).split(TOGETHER):
                pictures, labels = self.held_out.at(part)
                logits = forward(model, normalized(pictures))
                hits = logits.topk(min(5, self.classes)).indices == labels[:, None]
                right += torch.stack([hits[:, 0].sum(), hits.any(1).sum()])
            top1, top5 = (100 * right / len(self.held_out)).tolist()
            found |= {f"top1{ending}": top1, f"top5{ending}": top5}
        self.model.train()
        return found

    def save(self, folder: Path) -> None:
        save_state(
            folder, self.epoch, self.model, self.ema, self.optimizer,
            epoch=self.epoch, curve=self.curve, seconds=self.seconds,
        )  # fmt: skip

    def load(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            progress = load_state(checkpoint, self.device, self.model, self.ema, self.optimizer)
            self.epoch, self.curve, self.seconds = (progress[name] for name in ("epoch", "curve", "seconds"))

    def record(self) -> Record:
        """What is to be kept."""
        last = {} if self.diverged else {k: v for k, v in self.curve[-1].items() if k not in ("epoch", "loss")}
        return {
            **last, "diverged": self.diverged, "parameters": sum(p.numel() for p in self.model.parameters()),
            "epochs": self.epochs, "steps": self.steps * self.epochs, "seconds": self.seconds, "curve": self.curve,
            "device": device_name(self.device), "torch": torch.__version__,
            "graph": self.step.graph,
        }  # fmt: skip


def forward(model: nn.Module, x: Tensor, criterion: nn.Module | None = None, target: Tensor | None = None) -> Tensor:
    """The loss, or the logits in float32; bf16 autocast on a GPU, float32 on a CPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
        logits = model(x)
    return logits.float() if criterion is None else criterion(logits.float(), target)


class Step:
    """Forward and backward, on a GPU as a CUDA graph: small layers would wait for Python."""

    def __init__(self, model: nn.Module, criterion: nn.Module, say: Say) -> None:
        self.model, self.criterion, self.say = model, criterion, say
        self.graph = False  # whether it is one
        self._run: Callable[[], object] | None = None

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch, whose gradients are where the optimiser reads them."""
        if self._run is None:
            self.x, self.target = x.clone(), target.clone()
            self._run = self._first()
        self.x.copy_(x)
        self.target.copy_(target)
        self._run()
        return self.loss.clone()

    def _first(self) -> Callable[[], object]:
        device = self.x.device
        if device.type != "cuda":
            return self._compute
        drawn = torch.cuda.get_rng_state(device)
        run, self.graph = replayed(self._compute, device, self.say)
        torch.cuda.set_rng_state(drawn, device)  # a resumed run draws what one does that captured at its start
        return run

    def _compute(self) -> None:
        self.model.zero_grad(set_to_none=True)
        loss = forward(self.model, self.x, self.criterion, self.target)
        loss.backward()
        self.loss = loss.detach()
