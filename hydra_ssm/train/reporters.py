"""Where a run's numbers go besides the terminal: TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from .errors import UserError
from .folder import RunFolder
from .recipe import Recipe

STEP = "train/global_step"


@contextmanager
def reporting(
    names: Sequence[str], folder: RunFolder, recipe: Recipe
) -> Iterator[Callable[[Path | None], list[TrainerCallback]]]:
    """A function from the checkpoint that a run goes on from to callbacks, which are closed at the end."""
    opened: list[WandB] = []
    logs: list[SummaryWriter] = []

    def open_them(checkpoint: Path | None) -> list[TrainerCallback]:
        found: list[TrainerCallback] = []
        if "tensorboard" in names:
            done = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
            logs.append(SummaryWriter(folder.tensorboard, purge_step=done + 1))  # what comes now takes their place
            found.append(TensorBoardCallback(logs[0]))
        if "wandb" in names:
            opened.append(WandB(folder, recipe))
        return [*found, *opened]

    failed = True
    try:
        yield open_them
        failed = False
    finally:
        for writer in logs:
            writer.close()  # of an error's run, too: the last points are those that explain it
        for reporter in opened:
            reporter.run.finish(exit_code=int(failed))


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a reporter whose package is missing."""
    if "wandb" in names:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"report_to wandb needs its package: pip install wandb ({error})") from error
    return wandb


class WandB(TrainerCallback):
    """Weights & Biases: one run there for one run here, also after an interruption.

    The step is a metric like others: W&B keeps what a run repeats that went back to an older checkpoint, where it would
    leave out steps below its own counter. Its own environment variables say where it goes: WANDB_MODE=offline,
    WANDB_PROJECT (hydra-ssm), WANDB_DIR (the run's training folder), ...
    """

    def __init__(self, folder: RunFolder, recipe: Recipe) -> None:
        identity = folder.training / "wandb-run"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        self.run: Any = _wandb().init(
            project=os.environ.get("WANDB_PROJECT", "hydra-ssm"),
            name=os.environ.get("WANDB_NAME", folder.path.name),
            id=os.environ.get("WANDB_RUN_ID", identity.read_text(encoding="utf-8").strip()),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder.training)),
            config=asdict(recipe),
        )
        self.run.define_metric("*", step_metric=STEP)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        named = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in logs.items()
        }
        self.run.log({**named, STEP: state.global_step})
