"""The names that timm.create_model knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..matrices import MATRICES
from .dropin import DropIn
from .models import HydraViT
from .patches import resized

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
FRONTS = {"patch16_224": {"img_size": 224, "patch_size": 16}, "patch4_32": {"img_size": 32, "patch_size": 4}}

# The paper's form. For pictures of 32 pixels the width within is such that the parameters come nearest to those of a
# ViT of the same width and 12 blocks.
HYDRA: dict[str, dict[str, Any]] = {
    **{
        f"vit_hydra_{size}_patch16_224": {"embed_dim": width, **FRONTS["patch16_224"]} for size, width in WIDTHS.items()
    },
    "vit_hydra_tiny_patch4_32": {"embed_dim": 192, "expand": 1.5, "headdim": 32, **FRONTS["patch4_32"]},
    "vit_hydra_small_patch4_32": {"embed_dim": 384, "expand": 5 / 3, "headdim": 32, **FRONTS["patch4_32"]},
}
DROP_IN: dict[str, dict[str, Any]] = {
    f"vit_{mixer}_dropin_{size}_{front}": {
        "mixer": mixer, "embed_dim": WIDTHS[size], "depth": 12, "num_heads": WIDTHS[size] // 64, **FRONTS[front],
    }
    for mixer in ("hydra", *MATRICES)
    for front in FRONTS
    for size in (WIDTHS if front == "patch16_224" else ("tiny", "small"))
}  # fmt: skip


def _cfg(model: dict[str, Any]) -> dict[str, Any]:
    size = model["img_size"]
    small = size < 64
    return {
        "input_size": (3, size, size), "fixed_input_size": True, "num_classes": 10 if small else 1000,
        "crop_pct": 1.0 if small else 0.9, "mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
    }  # fmt: skip


default_cfgs = generate_default_cfgs({name: _cfg(model) for name, model in (HYDRA | DROP_IN).items()})


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights whose position embeddings are of another square grid, for this model's."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is None or own is None or table.shape == own.shape:
        return state
    prefix = model.num_prefix_tokens if isinstance(model, DropIn) and not model.no_embed_class else 0
    patches: Any = model.patch_embed
    count = table.shape[1] - prefix
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"the weights have positions for {count} patches, not the {patches.num_patches} of img_size = "
            f"{patches.img_size}, and no square of them: make it with the img_size they are of, then set_input_size"
        )
    grid = resized(table[:, prefix:], (side, side), patches.grid_size)
    return {**state, "pos_embed": torch.cat([table[:, :prefix], grid], dim=1)}


def _register(name: str, kind: type[nn.Module], model: dict[str, Any]) -> None:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        features = {"out_indices": 3, "feature_cls": "getter"}
        given = {**model, **arguments}
        return build_model_with_cfg(kind, name, pretrained, pretrained_filter_fn=_fitted, feature_cfg=features, **given)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{kind.__name__} with {model}."
    register_model(create)


for _name, _model in HYDRA.items():
    _register(_name, HydraViT, _model)
for _name, _model in DROP_IN.items():
    _register(_name, DropIn, _model)
