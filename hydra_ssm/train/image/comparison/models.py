"""The compared models, of equal parameters, and the base models whose speed is measured."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ....encoder import expand_to
from ....mixer import MatrixMixer
from ....vision import DropIn, HydraViT
from ...errors import UserError
from ...matching import heads_of_layers
from .plan import Plan

TOLERANCE = 0.015  # of the ViT's parameters
REFERENCE = "quasiseparable"  # of twice the width within, says how many layers the paper's form has
MATRICES = {"hydra_vit": REFERENCE, "low_rank": "low_rank", "toeplitz": "toeplitz", "add": "add"}
BASE = {"vit": "vit_base_patch16_224", "hydra_vit": "vit_hydra_base_patch16_224"}


def build(row: str, plan: Plan, classes: int, size: int) -> nn.Module:
    """The model of a row. Raises UserError where its parameters are not the ViT's."""
    model = _made(row, plan, classes, size)
    with torch.device("meta"):
        target = parameters(_vit(plan, classes, size))
    if abs(parameters(model) - target) > TOLERANCE * target and plan.size != "small":
        raise UserError(
            f"{row} has {parameters(model):,} parameters and the ViT {target:,}, more than {TOLERANCE:.1%} apart: "
            f"choose a smaller headdim than {plan.headdim}, by which the width within grows"
        )
    return model


def base(name: str, size: int) -> nn.Module:
    """A base model for pictures of another size: of 1,000 classes."""
    return timm.create_model(BASE[name], img_size=size)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _made(row: str, plan: Plan, classes: int, size: int) -> nn.Module:
    if row == "vit":
        return _vit(plan, classes, size)
    if row == "hydra_dropin":
        return DropIn(mixer="hydra", headdim=plan.headdim, d_state=plan.d_state, **_common(plan, classes, size))
    return HydraViT(
        img_size=size, patch_size=plan.patch, num_classes=classes, embed_dim=plan.width, headdim=plan.headdim,
        d_state=plan.d_state, drop_path_rate=plan.drop_path, depth=_depth(plan), mixer=_mixers(row, plan, size),
    )  # fmt: skip


def _vit(plan: Plan, classes: int, size: int) -> VisionTransformer:
    return VisionTransformer(**_common(plan, classes, size))


def _common(plan: Plan, classes: int, size: int) -> dict[str, Any]:
    return {
        "img_size": size, "patch_size": plan.patch, "num_classes": classes, "embed_dim": plan.width,
        "depth": plan.vit_depth, "num_heads": plan.heads, "class_token": False, "global_pool": "avg",
        "drop_path_rate": plan.drop_path,
    }  # fmt: skip


def _target(plan: Plan) -> int:
    """Parameters of the ViT's blocks and position embeddings: what the paper's form has for its layers."""
    vit = 12 * plan.width**2 + 13 * plan.width  # attention, MLP and two norms, with their biases
    return plan.vit_depth * vit


def _depth(plan: Plan) -> int:
    heads = 2 * plan.width // plan.headdim
    return max(1, round(_target(plan) / _layer(plan, REFERENCE, heads, plan.d_state)))


def _mixers(row: str, plan: Plan, size: int) -> list[dict[str, Any]]:
    """One for each layer, whose heads differ by one step at most, so that their sum comes nearest to the ViT's."""
    matrix, depth = MATRICES[row], _depth(plan)
    tokens = (size // plan.patch) ** 2
    target = _target(plan) + tokens * plan.width
    heads = heads_of_layers(depth, target, lambda heads: _layer(plan, matrix, heads, plan.d_state), 16 * plan.width)
    return [_spec(plan, matrix, number) for number in heads]


@cache
def _layer(plan: Plan, matrix: str, heads: int, d_state: int) -> int:
    """Parameters of a layer: the mixer and its norm."""
    with torch.device("meta"):
        spec = _spec(plan, matrix, heads)
        return parameters(MatrixMixer(plan.width, headdim=plan.headdim, d_state=d_state, **spec)) + 2 * plan.width


def _spec(plan: Plan, matrix: str, heads: int) -> dict[str, Any]:
    return {"matrix": matrix, "expand": expand_to(heads * plan.headdim, plan.width)}
