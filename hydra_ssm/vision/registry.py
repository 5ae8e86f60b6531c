"""The names that timm.create_model knows."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs = generate_default_cfgs({name: _cfg(model) for name, model in (HYDRA | DROP_IN).items()})


def _fitted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights whose position embeddings are of another square grid, for this model's."""
    table, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is None or own is None or table.shape == own.shape:
        return state
    prefix = model.num_prefix_tokens if isinstance(model, DropIn) and not model.no_embed_class else 0
    side = math.isqrt(table.shape[1] - prefix)
    grid = resized(table[:, prefix:], (side, side), model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
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
