"""What a step costs: of the compared models as they are trained, and of base models from 64 to 1,024 pixels."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....bench.clock import Run
from ....bench.machine import facts
from ....bench.measure import measure
from ....bench.report import Row
from ...errors import in_a_line
from ...records import read_json, write_json
from ...workers import Say
from .jobs import device_works
from .loop import forward
from .models import BASE, base, build
from .plan import Plan

SPEED, RESOLUTIONS = "speed.json", "resolutions.json"
FAILED = "failed"  # begins the note of a model that is tried again by the next call, after the others
PIXELS = (64, 128, 224, 384, 512, 768, 1024)
TOKENS = 16_384  # of the batch at every resolution
PATCH = 16  # of the base models

Rows = dict[str, dict[str, Any]]


def measure_models(out: Path, plan: Plan, rows: list[str], classes: int, size: int, deadline: float, say: Say) -> None:
    """Each compared model alone, on a batch of the training's size; results so far are kept."""

    def make(row: str) -> Callable[[], nn.Module]:
        return lambda: build(row, plan, classes, size)

    wanted = {row: (make(row), plan.batch_size, size, (size // plan.patch) ** 2) for row in rows}
    _measure_all(out / SPEED, wanted, deadline, say)


def measure_resolutions(out: Path, deadline: float, say: Say, pixels: tuple[int, ...] = PIXELS) -> None:
    """ViT and Hydra-ViT base with as many pictures as have `TOKENS` tokens together."""

    def make(name: str, size: int) -> Callable[[], nn.Module]:
        return lambda: base(name, size)

    wanted = {}
    for size in pixels:
        tokens = (size // PATCH) ** 2
        for name in BASE:
            wanted[f"{name} {size}"] = (make(name, size), max(1, TOKENS // tokens), size, tokens)
    _measure_all(out / RESOLUTIONS, wanted, deadline, say)


def read(path: Path) -> dict[str, Any]:
    """What was measured: the machine, and a row for each name."""
    return read_json(path) or {"machine": {}, "rows": {}}


def _measure_all(
    path: Path, wanted: dict[str, tuple[Callable[[], nn.Module], int, int, int]], deadline: float, say: Say
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = read(path)
    found["machine"] = found["machine"] or facts(device)
    known = {name: row for name, row in found["rows"].items() if not row["note"].startswith(FAILED)}
    for name in sorted(wanted.keys() - known.keys(), key=lambda n: (n in found["rows"], list(wanted).index(n))):
        if time.time() >= deadline:
            return
        if not device_works():
            say("what is left to be measured waits for the next call: the device failed this process")
            return
        make, batch, size, tokens = wanted[name]
        row = asdict(_measured(name, batch, tokens, partial(_runs, make, batch, size, device), device))
        best = {part: row[f"graph_{part}"] or row[part] for part in ("forward", "step")}
        row |= {f"pictures_per_second_{part}": 1e3 * batch / ms if ms else None for part, ms in best.items()}
        found["rows"][name] = {**row, "pixels": size, "graph": row["graph_step"] is not None, "device": device.type}
        say(f"{name}, {batch} x {tokens} tokens: {row['note'] or _line(row)}")
        write_json(path, found, indent=1)


def _measured(name: str, batch: int, tokens: int, make: Callable[[], dict[str, Run]], device: torch.device) -> Row:
    """A row; what fails, of whatever class, is a note in it, and the others are measured all the same."""
    try:
        return measure(name, batch, tokens, make, device)
    except Exception as error:
        return Row(name, batch, tokens, note=f"{FAILED}: {in_a_line(error)}")
    finally:
        gc.collect()
        if device.type == "cuda" and device_works():
            torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    rates = [f"{row[f'pictures_per_second_{part}']:,.0f} pictures/s {part}" for part in ("forward", "step")]
    return f"{', '.join(rates)}, {row['peak'] or 0:,.0f} MB"


def _runs(make: Callable[[], nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Run]:
    torch.manual_seed(0)
    model = make().to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    criterion = nn.CrossEntropyLoss()

    def infer() -> object:
        with torch.no_grad():
            return forward(model.eval(), x)

    def step() -> object:
        for p in model.parameters():
            p.grad = None
        loss = forward(model.train(), x, criterion, labels)
        loss.backward()
        return loss.detach()

    return {"forward": infer, "step": step}
