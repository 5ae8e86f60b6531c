"""The folder that a run leaves: weights and a description that timm, `eval` and `predict` load. No code is in it.

config.json              in timm's form: timm.create_model("local-dir:FOLDER", pretrained=True)
model.safetensors        the averaged weights
raw.safetensors          those of the last step
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ... import vision
from ...vision.patches import sizes
from ..errors import UserError, in_a_line
from .recipe import ImageRecipe

CONFIG, AVERAGED, RAW = "config.json", "model.safetensors", "raw.safetensors"
INPUT = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

Config = dict[str, Any]


class Trained(NamedTuple):
    """A model out of a folder, and how its pictures are to be prepared."""

    model: nn.Module
    config: Config
    classes: list[str]


def create(recipe: ImageRecipe, classes: int) -> tuple[nn.Module, Config]:
    """A new model and the form of its pictures. Raises UserError for names and arguments that timm does not take."""
    if not timm.is_model(recipe.model):
        known = ", ".join(vision.MODELS[:4])
        raise UserError(f"model must be a name that timm knows, such as {known}, got {recipe.model}")
    arguments = model_arguments(recipe)
    try:
        model = timm.create_model(
            recipe.model, num_classes=classes, drop_path_rate=recipe.drop_path or None, **arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        arguments |= {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
        raise UserError(
            f"{recipe.model} cannot be made with {arguments}: {error}; --img-size and --drop-path (0: none) change them"
        ) from error
    return model, config_of(model, recipe)


def on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """There, its convolutions for pictures whose channels come last."""
    return model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def model_arguments(recipe: ImageRecipe) -> dict[str, Any]:
    """What the model's function is given: the size of the pictures where the model has one, convolutions take any."""
    described = timm.get_pretrained_cfg(recipe.model)
    sized = recipe.img_size is not None and (described is None or described.fixed_input_size)
    return {**recipe.model_args, **({"img_size": recipe.img_size} if sized else {})}


def config_of(model: nn.Module, recipe: ImageRecipe) -> Config:
    """Size, colours and scaling of the pictures that a model takes."""
    given = timm.data.resolve_model_data_config(model)
    side = recipe.img_size or recipe.model_args.get("img_size")
    if side is not None:
        given["input_size"] = (given["input_size"][0], *sizes(side))
    if given["input_size"][1] < 64:
        given["crop_pct"] = 1.0  # nothing can be spared
    return {name: given[name] for name in INPUT if name in given}


def save(
    folder: Path, recipe: ImageRecipe, config: Config, classes: Sequence[str], weights: Mapping[str, dict[str, Tensor]]
) -> None:
    """Write config.json and the weights, by file name."""
    described = {
        "architecture": recipe.model, "num_classes": len(classes), "model_args": model_arguments(recipe),
        "pretrained_cfg": {**config, "label_names": list(classes), "num_classes": len(classes)},
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    for name, state in weights.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / name)


def load(folder: Path, device: torch.device, *, raw: bool = False) -> Trained:
    """The model of a folder. Raises UserError where there is none."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, classes = found["architecture"], found["pretrained_cfg"]["label_names"]
        config = {key: found["pretrained_cfg"][key] for key in INPUT if key in found["pretrained_cfg"]}
        model = timm.create_model(name, num_classes=len(classes), **found["model_args"])
        model.load_state_dict(load_file(folder / (RAW if raw else AVERAGED)))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} must be what hydra-ssm image train wrote: {in_a_line(error)}") from error
    return Trained(on_device(model, device).eval(), config, classes)
