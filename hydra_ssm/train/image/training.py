"""Training of an image classifier by the paper's recipe, from pictures to a folder that timm loads."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..checkpoints import newest_whole, remove_old, remove_unfinished, whole_folder
from ..errors import Diverged, Stopped, UserError
from ..workers import stopping
from .baselines import logistic_regression, most_frequent
from .evaluation import number_of_workers, score
from .folder import DATA, TRAINED_ON, ImageFolder
from .loading import Batch, Notes, Pictures, TrainingOrder, loader, normalized, seed_drawing, training_transform
from .progress import Shown
from .recipe import ImageRecipe
from .report import finish
from .result import create, on_device
from .sources import Part, in_full, is_divided, open_parts

STATE = "state.pt"
SAY_EVERY = 1.0  # seconds
ASK_EVERY = 10  # steps: whether a process was told to stop, which all of them must know
WAIT = timedelta(hours=2)  # for the process that reads through the data; the default of NCCL is ten minutes


def train(recipe: ImageRecipe, out: Path, *, overwrite: bool = False) -> dict[str, Any] | None:
    """Train a classifier and leave it in the folder `out`. Returns its metrics, None in processes that only help.

    Under torchrun every process calls it. overwrite: a run that is there already is removed, once the new one has read
    its data.

    Raises:
        UserError: a mistake of the user's, training that diverges, or a full disk; what was saved before is intact.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    folder, recipe = ImageFolder(out), replace(recipe, data=in_full(recipe.data))
    with processes() as (rank, world, device):
        _check_divides(recipe, world)
        parts = None
        if rank == 0:
            folder.check_free(overwrite)
            parts = open_parts(recipe.data, recipe.seed)
            if len(parts[2]) < 2:
                raise UserError(f"there must be pictures of at least two classes, got {parts[2][0]} alone")
            _, config = create(recipe, len(parts[2]))  # raises where it cannot be made, before anything is written
            training_transform(recipe, config)
            _check_enough(parts[0], recipe)
            with folder.begin(overwrite) as part:
                (part / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
                (part / DATA).write_text(json.dumps(_facts(*parts)) + "\n", encoding="utf-8")
                if not is_divided(*parts[:2]):  # an evaluation must know what was held out
                    np.save(part / TRAINED_ON, np.sort(parts[0].marks()))
        _wait(world)
        return Run(folder, rank, world, device, parts).train()


def resume(out: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Go on with the run in `out` from its newest whole checkpoint. Returns its metrics; those it has, if it has ended.

    On a CPU the result is what it would have been without the interruption, to the last bit, given the same number of
    processes and threads.

    Args:
        given: settings that the run must have, by name.

    Raises:
        UserError: there is no run, it has other settings, or its pictures have changed; or a full disk.
        Stopped: as in `train`.
    """
    folder = ImageFolder(out)
    recorded = asdict(folder.read_settings())
    asked = dict(given or {})
    if "data" in asked:
        asked["data"], recorded["data"] = in_full(asked["data"]), in_full(recorded["data"])
    for name, value in asked.items():
        if name != "workers" and recorded[name] != value:
            raise UserError(f"{name} is {recorded[name]} in the run that goes on in {out}, got {value}")
    if folder.result():
        return json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    folder.check_prepared()
    with processes() as (rank, world, device):
        _check_divides(folder.read_settings(), world)
        return Run(folder, rank, world, device).train()


@contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """(rank, number of processes, device) of this process, as torchrun has it, and the connection between them."""
    world, rank, local = (int(os.environ.get(name, usual)) for name, usual in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield rank, world, device
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield rank, world, device
    finally:
        dist.destroy_process_group()


def _wait(world: int) -> None:
    if world > 1:
        dist.barrier()


def _check_divides(recipe: ImageRecipe, world: int) -> None:
    share = recipe.batch_size // recipe.accumulate
    if share % world or (recipe.mixes and share // world % 2):
        raise UserError(
            f"batch_size = {recipe.batch_size} in accumulate = {recipe.accumulate} parts must divide among {world} "
            f"processes{', evenly for mixup and cutmix' if recipe.mixes else ''}"
        )


def _check_enough(train: Part, recipe: ImageRecipe) -> None:
    if len(train) < recipe.batch_size:
        raise UserError(
            f"there must be as many pictures to train on as in a step, {recipe.batch_size}, got {len(train)}: choose a "
            "smaller --batch-size"
        )


def _facts(train: Part, held_out: Part, classes: list[str]) -> dict[str, Any]:
    return {
        "classes": classes, "train_pictures": len(train), "held_out_pictures": len(held_out),
        "train": train.fingerprint(), "held_out": held_out.fingerprint(),
    }  # fmt: skip


class Run:
    """A run from its folder: what it trains on, its state, and the way to its result."""

    def __init__(
        self,
        folder: ImageFolder,
        rank: int,
        world: int,
        device: torch.device,
        parts: tuple[Part, Part, list[str]] | None = None,
    ) -> None:
        self.folder, self.rank, self.world, self.device = folder, rank, world, device
        self.recipe = recipe = folder.read_settings()
        self.train_part, self.held_out, self.classes = parts or open_parts(recipe.data, recipe.seed)
        self._check_same()
        torch.manual_seed(recipe.seed)
        model, self.config = create(recipe, len(self.classes))
        self.model = on_device(model, device)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True, warmup_power=0.75)
        self.order = TrainingOrder(len(self.train_part), recipe, rank, world)
        self.steps = self.order.steps * recipe.epochs
        criterion = SoftTargetCrossEntropy() if recipe.mixes else LabelSmoothingCrossEntropy(recipe.smoothing)
        self.task = ClassificationTask(self.model, criterion, device=device, verbose=False)
        if world > 1:
            self.task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
        self._prepare_optimizer()
        self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(self.classes))
        self.erasing = RandomErasing(recipe.erase, mode="pixel", device=device) if recipe.erase else None
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
        before, now = self.folder.read_data(), _facts(self.train_part, self.held_out, self.classes)
        if before != now:
            raise UserError(
                f"the pictures of {self.recipe.data} have changed since the run began, from "
                f"{before['train_pictures']:,} to train on to {now['train_pictures']:,}, or in their names: start "
                "again with --overwrite"
            )

    def train(self) -> dict[str, Any] | None:
        """From the newest whole checkpoint, or the start, to the end."""
        if self.rank == 0:
            for path in (self.folder.path, self.folder.training, self.folder.checkpoints):
                remove_unfinished(path)
        self._load(newest_whole(self.folder.checkpoints))
        _wait(self.world)
        asked = threading.Event()
        logs = SummaryWriter(self.folder.tensorboard, purge_step=self.done + 1) if self.rank == 0 else None
        with stopping(asked) as received, Shown(self.steps, self.done, self.rank > 0) as shown:
            self.shown, self.logs = shown, logs
            while len(self.curve) < self.recipe.epochs:
                if self.done == (len(self.curve) + 1) * self.order.steps:
                    self._evaluate(asked)
                else:
                    self._epoch(asked)
                if len(self.curve) < self.recipe.epochs and self._anybody(asked.is_set()):
                    self._save()
                    raise Stopped(self.done, self.steps, received[0] if received else 15, self.folder.path)
        self._check_finite()
        self.notes = self._gathered(self.notes)
        if self.rank > 0:
            _wait(self.world)
            return None
        try:
            return finish(self, self._baseline())
        finally:
            if logs is not None:
                logs.close()
            _wait(self.world)

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
            ask = self.world == 1 or self.done % ASK_EVERY == 0  # among several the GPU is waited for
            if ask and self._anybody(asked.is_set()):
                return

    def _step(self, batch: Batch) -> None:
        recipe = self.recipe
        self.notes |= batch.notes
        # All that a step draws: mixing, erasing, what the model drops.
        torch.manual_seed(seed_drawing(recipe.seed, self.done, self.rank, 1))
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
        self._tell(len(batch.labels) * self.world)

    def _backward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = normalized(pixels, self.config, self.device)
        target = labels.to(self.device, non_blocking=True)
        if self.erasing is not None:
            x = self.erasing(x)
        if self.recipe.mixes:
            x, target = self.mixup(x, target)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
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
            models, self.held_out, self.config, self.device, workers=self.workers, rank=self.rank, world=self.world,
            stop=asked.is_set,
        )  # fmt: skip
        if self._anybody(asked.is_set()):
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

    def _anybody(self, asked: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.world == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _gathered(self, notes: Notes) -> Notes:
        if self.world == 1:
            return notes
        everybody: list[Notes] = [{} for _ in range(self.world)]
        dist.all_gather_object(everybody, notes)
        return {name: text for own in everybody for name, text in own.items()}

    def _check_finite(self) -> None:
        """Raises Diverged, in all processes."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise Diverged(self.done, "its weights are no longer finite", self.recipe.learning_rate)

    def _save(self) -> None:
        self._check_finite()
        notes = self._gathered(self.notes)
        if self.rank > 0:
            return
        state = {
            "model": self.model.state_dict(), "ema": self.ema.module.state_dict(), "done": self.done,
            "optimizer": self.optimizer.state_dict(), "curve": self.curve, "notes": notes,
        }  # fmt: skip
        with whole_folder(self.folder.checkpoints / f"checkpoint-{self.done}") as part:
            torch.save(state, part / STATE)
        remove_old(self.folder.checkpoints)

    def _load(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        state = torch.load(checkpoint / STATE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.curve, self.notes = state["done"], state["curve"], state["notes"]

    def _baseline(self) -> tuple[str, float]:
        """What a model must be better than."""
        if self.recipe.data is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return "logistic regression on the pixels", logistic_regression(self.train_part, self.held_out)
        return "always the commonest class", most_frequent(self.train_part, self.held_out)
