"""Hydra-ViT as a transformers model. Importing this registers it with the Auto classes."""

# No `from __future__ import annotations` here: it makes types strings, and those @strict does not check.

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from ..layer import Modulation
from ..pretrained import IN_FLOAT32, initialize_mixers
from .models import HydraViT

ARGUMENTS = {  # of HydraViT, by the name that they have in a configuration
    "image_size": "img_size", "patch_size": "patch_size", "num_channels": "in_chans", "hidden_size": "embed_dim",
    "num_hidden_layers": "depth", "mixers": "mixer", "order": "order", "d_state": "d_state", "headdim": "headdim",
    "expand": "expand", "d_conv": "d_conv", "mlp_ratio": "mlp_ratio", "dynamic_image_size": "dynamic_img_size",
    "classifier_dropout": "drop_rate", "hidden_dropout": "proj_drop_rate", "drop_path_rate": "drop_path_rate",
    "layer_norm_eps": "norm_eps",
}  # fmt: skip


@strict
class HydraViTConfig(PreTrainedConfig):
    """Arguments of `HydraViT` under transformers' names. The defaults are the paper's base model.

    Args:
        image_size, patch_size: one number for a square.
        mixers: for all layers, or a list with one a layer.
        order: in which the patches are read, see `hydra_ssm.vision.orders`.
        position_embeddings: whether they are learned.
        dynamic_image_size: take pictures of any size of whole patches.
        classifier_dropout, hidden_dropout, drop_path_rate: of pooled features, of what mixers add, of whole branches.
        image_mean, image_std: by which `image_processor` normalises each channel, of values from 0 to 1.

    Raises:
        ValueError: sizes that do not fit together, or an unknown mixer or order.
    """

    model_type = "hydra_ssm_vit"

    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 24
    mixers: str | dict[str, Any] | list[str | dict[str, Any]] = "hydra"
    order: str = "row"
    d_state: int = 64
    headdim: int = 64
    expand: float | int = 2
    d_conv: int = 7
    mlp_ratio: float | int = 0
    position_embeddings: bool = False
    dynamic_image_size: bool = False
    pooling: Literal["avg", "max"] = "avg"
    classifier_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    image_mean: list[float] | None = None
    image_std: list[float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        try:
            with torch.device("meta"):  # the model knows its own rules; this holds no memory
                self.make()
        except TypeError as error:
            raise ValueError(
                f"mixers must be made of arguments of MatrixMixer, got {self.mixers!r}: {error}"
            ) from error

    def make(self) -> HydraViT:
        """A new model."""
        return HydraViT(
            **{own: getattr(self, name) for name, own in ARGUMENTS.items()},
            num_classes=self.num_labels or 0,
            global_pool=self.pooling,
            pos_embed="learn" if self.position_embeddings else "none",
        )

    def image_processor(self) -> Any:
        """A ViTImageProcessor: makes any picture this model's input. Save it beside the model for pipelines."""
        from transformers import ViTImageProcessor  # needs torchvision

        size = self.image_size if isinstance(self.image_size, list) else [self.image_size] * 2
        half = [0.5] * self.num_channels
        return ViTImageProcessor(
            size={"height": size[0], "width": size[1]}, image_mean=self.image_mean or half,
            image_std=self.image_std or half, resample=3,
        )  # fmt: skip


class HydraForImageClassification(PreTrainedModel):
    """A HydraViT, its classifier included: `model.vit`, whose weights are those of a timm model of the same sizes."""

    config_class = HydraViTConfig
    config: HydraViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = "image"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # attention layers call it
    _no_split_modules = ["EncoderLayer"]  # noqa: RUF012 - transformers copies it
    _keep_in_fp32_modules_strict = list(IN_FLOAT32)  # noqa: RUF012

    def __init__(self, config: HydraViTConfig) -> None:
        super().__init__(config)
        self.vit = config.make()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """ViT's initialisation; what a checkpoint filled stays."""
        if isinstance(module, Modulation | nn.Conv1d | nn.Conv2d):
            module.reset_parameters()  # transformers guards the functions that it calls
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, HydraViT) and module.pos_embed is not None:
            init.trunc_normal_(module.pos_embed, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        """As transformers does, and the mixers' own for what they mix with."""
        initialize_mixers(self, super().initialize_weights)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels) of pictures (B, num_channels, H, W); the loss with labels (B,).

        Args:
            labels: (B,) int classes; (B, num_labels) float 0 or 1 where a picture has several; float for regression
                (num_labels = 1, or problem_type).
            output_hidden_states: give hidden_states, (B, patches, hidden_size) each: the embedded patches and what each
                layer gives, in row-major order.

        Raises:
            ValueError: pictures of another size or number of channels; output_attentions.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions must be False: these mixers have no attention maps, "
                "hydra_ssm.inspection.mixing_matrices gives what they mix with"
            )
        states = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            states = self.vit.hidden_states(pixel_values)
            features = self.vit.encoder.last_norm(states[-1])
        else:
            features = self.vit.forward_features(pixel_values)
        logits = self.vit.forward_head(features)
        loss = None
        if labels is not None:
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = self.loss_function(labels, wide, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=states)


AutoConfig.register(HydraViTConfig.model_type, HydraViTConfig, exist_ok=True)
AutoModelForImageClassification.register(HydraViTConfig, HydraForImageClassification, exist_ok=True)
