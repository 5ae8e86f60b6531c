"""Image models out of folders: those that timm writes, as `hydra-ssm image train` does, and those of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")


class PictureModel(NamedTuple):
    """A model, and how a picture becomes its input."""

    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]  # to (channels, height, width), normalised
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str] | None

    def shown(self, pixels: Tensor) -> Tensor:
        """(height, width, 3) from 0 to 1 of an input (channels, height, width)."""
        mean, std = (torch.tensor(t)[:, None, None] for t in (self.mean, self.std))
        picture = (pixels * std + mean).clamp(0, 1)
        return (picture if self.channels == 3 else picture[:1].expand(3, -1, -1)).permute(1, 2, 0)


def load_image_model(folder: Path) -> PictureModel:
    """The model of a folder, on the CPU, in evaluation mode.

    Raises:
        ValueError: there is none, it cannot be read, or it is not of grey or coloured pictures.
    """
    found = _config(folder)
    try:
        if "architecture" in found:
            return _of_timm(folder, found)
        if found.get("model_type") == "hydra_ssm_vit":
            return _of_transformers(folder)
    except (KeyError, TypeError, RuntimeError, AssertionError, OSError) as error:
        raise ValueError(f"the image model in {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    raise ValueError(f"{folder} must hold an image model: what timm or transformers save, with {CONFIG}")


def _check_channels(channels: int, folder: Path) -> None:
    if channels not in (1, 3):
        raise ValueError(f"the model in {folder} must be of pictures of 1 or 3 channels, it is of {channels}")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_timm(folder: Path, found: dict[str, Any]) -> PictureModel:
    described = found.get("pretrained_cfg", {})
    arguments = {"num_classes": found.get("num_classes", described.get("num_classes")), **found.get("model_args", {})}
    model = timm.create_model(found["architecture"], **arguments).eval()
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None:
        raise ValueError(f"{folder} must hold weights, {' or '.join(WEIGHTS)}")
    timm.models.load_checkpoint(model, str(weights))
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    data = resolve_data_config({k: described[k] for k in names if k in described}, model=model)
    channels = data["input_size"][0]
    _check_channels(channels, folder)
    return PictureModel(
        model, create_transform(**data), channels, data["mean"], data["std"], described.get("label_names")
    )


def _of_transformers(folder: Path) -> PictureModel:
    from transformers import AutoImageProcessor

    from .huggingface import HydraForImageClassification

    whole = HydraForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    saved = (folder / "preprocessor_config.json").exists()
    processor: Any = AutoImageProcessor.from_pretrained(folder) if saved else whole.config.image_processor()
    labels = whole.config.id2label or {}

    def prepare(picture: Image.Image) -> Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    _check_channels(whole.config.num_channels, folder)
    classes = [labels[i] for i in sorted(labels)]
    mean, std = processor.image_mean, processor.image_std
    return PictureModel(whole.vit, prepare, whole.config.num_channels, mean, std, classes)
