"""How well a model names pictures: top-1, top-5, loss, and pictures a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .folder import ImageFolder
from .loading import MISSING, EvaluationOrder, Notes, Pictures, evaluation_transform, loader, normalized
from .result import RAW, Config, load
from .sources import Part, open_held_out

Say = Callable[[str], None]


@dataclass(frozen=True)
class Score:
    """Of the pictures that could be read; top-1 and top-5 between 0 and 1."""

    top1: float
    top5: float
    loss: float
    pictures: int
    seconds: float = 0.0  # that the model took
    total_seconds: float = 0.0  # with reading, as if for it alone


def score(
    models: Mapping[str, nn.Module],
    part: Part,
    config: Config,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    precision: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Score], Notes]:
    """The score of each model, in eval mode, on a part that is read once and dealt out over the processes.

    Nothing once `stop` says so.
    """
    pictures = Pictures(part, evaluation_transform(config), training=False)
    batches = loader(pictures, EvaluationOrder(len(part), batch_size, rank, world), workers)
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=device)  # right, right in five, loss, pictures
    busy = [0.0] * len(models)
    notes: Notes = {}
    training, started = [model.training for model in models.values()], time.perf_counter()
    for batch in batches:
        if stop():
            break
        notes |= batch.notes
        known = batch.labels != MISSING
        if not known.any():
            continue
        pixels, labels = batch.pixels[known], batch.labels[known]
        for number, model in enumerate(models.values()):
            before = time.perf_counter()
            sums[number] += _sums(logits_of(model.eval(), pixels, config, device, precision), labels.to(device))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            busy[number] += time.perf_counter() - before
    for model, was in zip(models.values(), training, strict=True):
        model.train(was)
    if world > 1:
        torch.distributed.all_reduce(sums)
    if stop():
        return {}, notes
    reading = time.perf_counter() - started - sum(busy)
    found = {}
    for name, own, spent in zip(models, sums.tolist(), busy, strict=True):
        right, five, loss, count = own
        if not count:
            raise UserError(f"none of the {len(part)} pictures to evaluate on could be read")
        found[name] = Score(right / count, five / count, loss / count, int(count), spent, spent + reading)
    return found, notes


@torch.no_grad()
def logits_of(
    model: nn.Module, pixels: Tensor, config: Config, device: torch.device, precision: str = "auto"
) -> Tensor:
    """(B, classes) float32 of (B, 3, H, W) uint8."""
    x = normalized(pixels, config, device)
    with autocast(device, precision):
        found = model(x)
    return found.float()


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """Products in bfloat16 where they are asked for, or on a GPU that has them."""
    has = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and has))


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    count = torch.tensor(len(labels), device=labels.device)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), loss, count]).double()


def evaluate(folder: Path, data: str | None, *, batch_size: int = 256, workers: int = -1, say: Say = print) -> Any:
    """What `hydra-ssm image eval` does: returns {"averaged": ..., "raw": ...} and what could not be read.

    Raises UserError where the folder holds no model or the data no pictures of its classes.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, -1)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"averaged": False, "raw": True} if (folder / RAW).is_file() else {"averaged": False}
    trained = {name: load(folder, device, raw=raw) for name, raw in kinds.items()}
    _, config, classes = trained["averaged"]
    part = open_held_out(data, classes, ImageFolder(folder).trained_on())
    models = {name: one.model for name, one in trained.items()}
    results, notes = score(models, part, config, device, batch_size=batch_size, workers=number_of_workers(workers))
    for name, result in results.items():
        say(
            f"{name + ' weights':17} top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.3f}; "
            f"{result.pictures / result.seconds:,.0f} pictures/s, with reading "
            f"{result.pictures / result.total_seconds:,.0f}"
        )
    say(f"on {results['averaged'].pictures:,} pictures")
    for line in told(notes):
        say(line)
    return {**{name: asdict(result) for name, result in results.items()}, "notes": notes}


def told(notes: Notes, done: str = "left out") -> list[str]:
    """What there is to say of pictures that were converted, and of those that could not be read: what was done."""
    converted = [text for text in notes.values() if ":" not in text]
    lines = (
        [f"converted: {', '.join(f'{converted.count(k)} {k}' for k in sorted(set(converted)))}"] if converted else []
    )
    broken = [(name, text) for name, text in sorted(notes.items()) if ":" in text]
    if broken:
        lines.append(f"{len(broken)} pictures could not be read and were {done}:")
        lines += [f"  {name}: {text.partition(': ')[2]}" for name, text in broken[:20]]
        lines += [f"  and {len(broken) - 20} more"] if len(broken) > 20 else []
    return lines


def number_of_workers(given: int) -> int:
    """Processes that read: what is asked for, or one for each core that is there, none where there is one."""
    import os

    if given >= 0:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of a launcher, which share them
    return cores if cores > 1 and torch.cuda.is_available() else 0
