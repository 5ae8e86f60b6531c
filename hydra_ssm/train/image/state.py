"""A checkpoint of an image run: weights, their average, the optimiser's state, and how far the run is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ..checkpoints import remove_old, whole_folder

STATE = "state.pt"


def save_state(
    folder: Path, number: int, model: nn.Module, ema: ModelEmaV3, optimizer: torch.optim.Optimizer, **progress: Any
) -> None:
    """A checkpoint of this number in a folder of them, of which the newest are kept."""
    state = {
        "model": model.state_dict(), "ema": ema.module.state_dict(), "optimizer": optimizer.state_dict(), **progress
    }  # fmt: skip
    with whole_folder(folder / f"checkpoint-{number}") as part:
        torch.save(state, part / STATE)
    remove_old(folder)


def load_state(
    checkpoint: Path, device: torch.device, model: nn.Module, ema: ModelEmaV3, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Into these three. Returns the progress that was saved."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location=device, weights_only=True)
    model.load_state_dict(state.pop("model"))
    ema.module.load_state_dict(state.pop("ema"))
    optimizer.load_state_dict(state.pop("optimizer"))
    return state
