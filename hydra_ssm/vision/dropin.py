"""The drop-in form: timm's Vision Transformer with any matrix mixer in place of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchDropout, register_notrace_module
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..encoder import MixerSpec, expand_to, make_mixer, undecayed
from ..mixer import MatrixMixer
from .orders import parse, reading
from .patches import sizes

MLP_STEP = 8  # widths of the MLP are multiples of it
TOLERANCE = 0.01  # of a ViT's parameters, within which those of a model of the same sizes are


@register_notrace_module  # torch.fx takes it as it is: it looks at its arguments
class MixerAttention(nn.Module):
    """A MatrixMixer where timm has attention: (B, L, dim) in and out."""

    def __init__(self, mixer: MatrixMixer, order: str, grid: tuple[int, int], prefix: int, dropout: float) -> None:
        super().__init__()
        self.mixer, self.dropout = mixer, nn.Dropout(dropout)
        self.order, self.grid, self.prefix = order, grid, prefix

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Raises ValueError for attn_mask and is_causal, which only attention's matrix has."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal must be left out: these mixers have no scores to be masked")
        orders = reading(self.order, self.grid, self.prefix, x.device)
        if orders is None:
            return self.dropout(self.mixer(x))
        (order,) = orders
        if order.places.shape[-1] != x.shape[1]:
            raise ValueError(f"the order {self.order!r} is one of {order.places.shape[-1]} tokens, got {x.shape[1]}")
        return self.dropout(order.restore(self.mixer(order.take(x))))

    def extra_repr(self) -> str:
        return f"order={self.order}"


class DropIn(VisionTransformer):
    """timm's Vision Transformer whose blocks mix with a MatrixMixer where they had attention.

    All else is timm's: MLP, position embeddings, heads, arguments. There is no class token, and the patches are
    averaged, unless the arguments say otherwise. The mixer gets the heads that bring it nearest to the parameters of
    attention, and the MLP's width takes the rest: all sizes of `hydra_ssm.vision` are within `TOLERANCE` of ViT.

    Args:
        mixer: see `hydra_ssm.encoder.make_mixer`; "attention" is the Transformer's own: a ViT.
        data_dependent: False for the fixed form of a matrix class, which takes pictures of img_size alone.
        order: one order, or a sum of several, that all layers read the patches in; for pictures of img_size. See
            `hydra_ssm.vision.orders`.
        headdim: of the mixer, or 64, below a width of 384 32.
        d_state: of the mixer, or headdim.
        d_conv: of the mixer.
        arguments: timm's; mlp_ratio is that of the ViT whose parameters are matched.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        mixer: MixerSpec = "hydra",
        *,
        data_dependent: bool | None = None,
        order: str = "row",
        headdim: int | None = None,
        d_state: int | None = None,
        d_conv: int = 7,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        class_token: bool = False,
        reg_tokens: int = 0,
        global_pool: Any = "avg",
        dynamic_img_size: bool = False,
        **arguments: Any,
    ) -> None:
        if len(parse(order)) > 1:
            raise ValueError(f"order must be one for all layers, HydraViT takes several in turn, got {order!r}")
        (height, width), patch = sizes(img_size), sizes(patch_size)
        grid = height // patch[0], width // patch[1]
        prefix = int(class_token) + reg_tokens
        headdim = headdim or (32 if embed_dim < 384 else 64)
        options = {"headdim": headdim, "d_state": d_state or headdim, "d_conv": d_conv}
        options["max_length"] = math.prod(grid) + prefix
        if mixer == "attention":
            options["headdim"] = embed_dim // num_heads
        elif data_dependent is not None:
            spec = {"matrix": "quasiseparable" if mixer == "hydra" else mixer} if isinstance(mixer, str) else mixer
            mixer = {**spec, "data_dependent": data_dependent}
        options, hidden = matched(mixer, embed_dim, options, mlp_ratio)
        with torch.device("meta"):
            fixed = not make_mixer(mixer, embed_dim, options).data_dependent
        fixed_size = fixed or order != "row"
        if dynamic_img_size and fixed_size:
            raise ValueError(
                f"dynamic_img_size needs row-major order and a mixer that is computed from the tokens, got {mixer!r} "
                f"in order {order!r}"
            )
        if arguments.get("patch_drop_rate") and fixed_size:
            raise ValueError(
                "patch_drop_rate must be 0 for fixed mixers and orders but row-major, which know each patch by its "
                f"place, got {arguments['patch_drop_rate']}"
            )

        class Attention(nn.Module):  # timm makes the blocks, and asks for a class: one that makes another's objects
            def __new__(cls, dim: int, proj_drop: float = 0.0, **attention: Any) -> MixerAttention:  # type: ignore[misc]
                with torch.device(attention.get("device") or torch.get_default_device()):
                    made = make_mixer(mixer, dim, options)
                return MixerAttention(made.to(dtype=attention.get("dtype")), order, grid, prefix, proj_drop)

        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, num_heads=num_heads,
            mlp_ratio=(hidden + 0.5) / embed_dim, class_token=class_token, reg_tokens=reg_tokens,
            global_pool=global_pool, dynamic_img_size=dynamic_img_size, attn_layer=Attention, **arguments,
        )  # fmt: skip
        self.fixed_size = fixed_size
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.ordered = True  # what timm leaves is shuffled, which attention alone does not see

    def no_weight_decay(self) -> set[str]:
        """timm's names, and the mixers'."""
        return super().no_weight_decay() | undecayed(self)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Raises ValueError where a fixed mixer or an order knows one size alone."""
        asked = (img_size, self.patch_embed.img_size), (patch_size, self.patch_embed.patch_size)
        if all(new is None or sizes(new) == tuple(own) for new, own in asked):
            return
        if self.fixed_size:
            raise ValueError(
                f"fixed mixers and orders but row-major take pictures of {self.patch_embed.img_size} alone"
            )
        super().set_input_size(img_size, patch_size)


def matched(mixer: MixerSpec, dim: int, options: Mapping[str, Any], mlp_ratio: float) -> tuple[dict[str, Any], int]:
    """Options of a mixer, and the width of an MLP, with which a block has the parameters of a ViT's."""
    attention = 4 * dim * dim + 4 * dim
    block = attention + 2 * int(mlp_ratio * dim) * dim + int(mlp_ratio * dim) + dim
    best: tuple[int, dict[str, Any]] | None = None
    reason: ValueError | None = None
    for heads in range(1, 4 * dim // options["headdim"] + 1):
        own = {**options, "expand": expand_to(heads * options["headdim"], dim)}
        try:
            found = parameters(mixer, dim, own)
        except ValueError as error:  # a class may ask for an even number of heads
            reason = error
            continue
        if best is not None and abs(found - attention) > abs(best[0] - attention):
            break
        best = found, own
    if best is None:
        raise ValueError(f"{mixer!r} cannot be made at a width of {dim} with {dict(options)}: {reason}") from reason
    hidden = (block - best[0] - dim) / (2 * dim + 1)
    return best[1], max(MLP_STEP, MLP_STEP * round(hidden / MLP_STEP))


def parameters(mixer: MixerSpec, dim: int, options: Mapping[str, Any]) -> int:
    """Of one mixer."""
    with torch.device("meta"):
        return sum(p.numel() for p in make_mixer(mixer, dim, options).parameters())
