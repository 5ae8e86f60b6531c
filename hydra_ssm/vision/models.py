"""Hydra-ViT, the paper's form: patches, an encoder of mixers without position embeddings, mean pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..encoder import Encoder, MixerSpec, undecayed
from ..layer import Modulation
from ..mixer import MatrixMixer
from .orders import Grid, parse, reading
from .patches import PatchEmbed, Size, resized, sizes

Pool = Literal["avg", "max", ""]
POOLS = ("avg", "max", "")


class HydraViT(nn.Module):
    """Patches, `depth` layers of mixers in place of attention and MLP, one norm, mean pooling, a linear classifier.

    With the defaults the paper's base model. All that timm asks of a model: features, intermediates, checkpointing,
    groups of layers, a new classifier, another size. Pictures may have one axis, as audio and time series, or three, as
    volumes and films: all sizes then have as many numbers.

    Args:
        img_size: of the pictures, one number for a square or one for each axis. With dynamic_img_size they may have any
            size of whole patches: mixers whose matrices are computed from the tokens extend to it. Fixed ones have a
            table of places and take this size alone.
        global_pool: "avg", "max" or "" (no pooling: the classifier sees each token).
        mixer: for all layers, or a list with one a layer; see `hydra_ssm.encoder.make_mixer`.
        order: in which the patches are read: "row", "column", "snake", "hilbert"; "row,column" for layers in turn,
            "row+column" for the sum over both in each layer. See `hydra_ssm.vision.orders`.
        d_state, headdim, expand, d_conv: of the mixers.
        mlp_ratio: width of a feed-forward network after each mixer, over embed_dim; 0: none, as in the paper.
        pos_embed: "none" or "learn", interpolated for other sizes.
        drop_rate: of the pooled features. pos_drop_rate: of the embedded patches. proj_drop_rate: of what
            the mixers add.
        drop_path_rate: of the last layer, see `hydra_ssm.Encoder`.
        d_condition: numbers of a condition that `forward` takes, such as an embedded class or time step.
        condition: what becomes of it, "modulation" of each layer or a "token" before the patches.
        device, dtype: of the parameters; decays, steps and skips stay in float32.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Pool = "avg",
        embed_dim: int = 768,
        depth: int = 24,
        mixer: MixerSpec | Sequence[MixerSpec] = "hydra",
        order: str = "row",
        d_state: int = 64,
        headdim: int = 64,
        expand: float = 2,
        d_conv: int = 7,
        mlp_ratio: float = 0.0,
        pos_embed: Literal["none", "learn"] = "none",
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        d_condition: int = 0,
        condition: Literal["modulation", "token"] = "modulation",
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        mixers = [mixer] * depth if isinstance(mixer, str | Mapping) else list(mixer)
        _check(global_pool=(global_pool, POOLS), pos_embed=(pos_embed, ("none", "learn")),
               condition=(condition, ("modulation", "token")))  # fmt: skip
        if len(mixers) != depth:
            raise ValueError(f"mixer must name one, or one for each of depth = {depth} layers, got {len(mixers)}")
        parse(order)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.order, self.dynamic_img_size = order, dynamic_img_size
        self.num_prefix_tokens = int(d_condition > 0 and condition == "token")
        with torch.device(torch.get_default_device() if device is None else device):
            self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, any_size=dynamic_img_size)
            table = torch.zeros(1, self.patch_embed.num_patches, embed_dim)
            self.pos_embed = nn.Parameter(table) if pos_embed == "learn" else None
            self.pos_drop = nn.Dropout(pos_drop_rate)
            self.condition_token = nn.Linear(d_condition, embed_dim) if self.num_prefix_tokens else None
            self.encoder = Encoder(
                embed_dim, mixers, d_ff=int(mlp_ratio * embed_dim), norm="pre", dropout=proj_drop_rate, eps=norm_eps,
                drop_path=drop_path_rate, d_condition=0 if self.num_prefix_tokens else d_condition, d_state=d_state,
                headdim=headdim, expand=expand, d_conv=d_conv,
                max_length=self.patch_embed.num_patches + self.num_prefix_tokens, **mixer_options,
            )  # fmt: skip
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        if dynamic_img_size and (fixed := self._fixed()):
            raise ValueError(f"dynamic_img_size needs mixers that are computed from the tokens, got a fixed {fixed[0]}")
        self.feature_info = [
            {"module": f"encoder.layers.{i}", "num_chs": embed_dim, "reduction": max(self.patch_embed.patch_size)}
            for i in range(depth)
        ]
        self.init_weights()
        self.to(dtype=dtype)

    def _fixed(self) -> list[MatrixMixer]:
        """The mixers that take one size alone."""
        return [m for m in self.encoder.modules() if isinstance(m, MatrixMixer) and not m.data_dependent]

    @torch.no_grad()
    def init_weights(self, needs_reset: bool = False) -> None:
        """ViT's initialisation of the linear layers, the mixers' own for the rest.

        needs_reset: draw that rest anew as well, for a model that was made on the meta device.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # type: ignore[operator]
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, Modulation):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    # ------------------------------------------------------------------------------------------------ the forward pass

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of pictures (B, in_chans, H, W), under conditions (B, d_condition)."""
        return self.forward_head(self.forward_features(x, condition))

    def forward_features(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, tokens, embed_dim) after the last norm, in row-major order, a condition's token first."""
        h, grid = self._embedded(x, condition)
        return self._encoded(h, grid, condition)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, or with pre_logits the pooled features, of what `forward_features` gives."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """(B, embed_dim) of tokens (B, tokens, embed_dim); those of patches alone, all as they are without pooling."""
        if not self.global_pool:
            return x
        x = x[:, self.num_prefix_tokens :]
        return x.mean(1) if self.global_pool == "avg" else x.amax(1)

    def hidden_states(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, tokens, embed_dim) each: what goes into the layers and what each gives, before the last norm."""
        h, grid = self._embedded(x, condition)
        return self._encoded(h, grid, condition, range(len(self.encoder.layers) + 1)).unbind(2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        condition: Tensor | None = None,
    ) -> Any:
        """What layers give, as timm's models return it: (final features, [of each]), or the list alone.

        Args:
            indices: numbers of layers, negative ones from the end; a number n: the last n; None: all.
            return_prefix_tokens: pairs (features, prefix tokens), where there are such.
            norm: apply the last norm to each.
            stop_early: with intermediates_only, do not run what comes after the last of them.
            output_fmt: "NCHW" (B, embed_dim, rows, columns), with other axes where the pictures have them, or "NLC"
                (B, patches, embed_dim).
            output_dict: the same by the names image_intermediates, image_intermediates_prefix and image_features.
        """
        _check(output_fmt=(output_fmt, ("NCHW", "NLC")))
        depth = len(self.encoder.layers)
        taken = take_indices(depth, indices)
        h, grid = self._embedded(x, condition)
        last = taken[-1] + 1 if stop_early and intermediates_only else depth
        numbers = sorted({*(i + 1 for i in taken), last})
        states = self._encoded(h, grid, condition, numbers).unbind(2)
        found = [state for state, number in zip(states, numbers, strict=True) if number - 1 in taken]
        found = [self.encoder.last_norm(h) for h in found] if norm else found
        shown: list[Any] = [self._shown(h, grid, output_fmt) for h in found]
        prefixes = [h[:, : self.num_prefix_tokens] for h in found] if return_prefix_tokens else []
        final = None if intermediates_only else self.encoder.last_norm(states[-1])
        if output_dict:
            named = {"image_intermediates": shown}
            named |= {"image_intermediates_prefix": prefixes} if prefixes and self.num_prefix_tokens else {}
            return named if final is None else {**named, "image_features": final}
        if prefixes and self.num_prefix_tokens:
            shown = list(zip(shown, prefixes, strict=True))
        return shown if final is None else (final, shown)

    def _embedded(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Grid]:
        """Tokens (B, L, D) that go into the encoder, and the patches along each axis."""
        h = self.patch_embed(x)
        grid = tuple(h.shape[1:-1])
        h = h.flatten(1, -2)
        if self.pos_embed is not None:
            h = h + resized(self.pos_embed, self.patch_embed.grid_size, grid)
        h = self.pos_drop(h)
        if self.condition_token is None:
            return h, grid
        wanted = len(h), self.condition_token.in_features
        if condition is None:
            condition = h.new_zeros(wanted)
        if tuple(condition.shape) != wanted:
            raise ValueError(f"condition must be (batch, d_condition) = {wanted}, got {tuple(condition.shape)}")
        return torch.cat([self.condition_token(condition)[:, None], h], dim=1), grid

    def _encoded(self, h: Tensor, grid: Grid, condition: Tensor | None, states: Sequence[int] | None = None) -> Tensor:
        order = reading(self.order, grid, self.num_prefix_tokens, h.device)
        own = None if self.num_prefix_tokens else condition
        return self.encoder(h, order=order, condition=own, states=states)

    def _shown(self, h: Tensor, grid: Grid, output_fmt: str) -> Tensor:
        h = h[:, self.num_prefix_tokens :]
        return h if output_fmt == "NLC" else h.unflatten(1, grid).movedim(-1, 1).contiguous()

    # ----------------------------------------------------------------------------------- what else timm asks of a model

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take none: position embeddings, and the mixers' decays, steps and skips."""
        return undecayed(self) | ({"pos_embed"} if self.pos_embed is not None else set())

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of names by which layer decay groups: stem, each layer, the last norm and the head."""
        layers = r"^encoder\.layers\.(\d+)"
        return {
            "stem": r"^pos_embed|patch_embed|condition_token",
            "blocks": r"^encoder\.layers" if coarse else [(layers, None), (r"^encoder\.last_norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer for its gradient: less memory, a third more time."""
        self.encoder.gradient_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer, an identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """A new classifier, none for 0 classes; another pooling if one is given."""
        if global_pool is not None:
            _check(global_pool=(global_pool, POOLS))
            self.global_pool = global_pool
        self.num_classes = num_classes
        if num_classes < 1:
            self.head = nn.Identity()
            return
        weight = self.patch_embed.proj.weight
        self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def set_input_size(self, img_size: Size | None = None, patch_size: Size | None = None) -> None:
        """Expect pictures of another size. Raises ValueError for fixed mixers, and for another patch size."""
        before = self.patch_embed.grid_size
        axes = len(before)
        if patch_size is not None and sizes(patch_size, axes) != self.patch_embed.patch_size:
            raise ValueError(f"patch_size must stay {self.patch_embed.patch_size}, got {patch_size}")
        if img_size is None:
            return
        size = sizes(img_size, axes)
        if self._fixed() and size != self.patch_embed.img_size:
            raise ValueError(f"fixed mixers take pictures of {self.patch_embed.img_size} alone, got {size}")
        self.patch_embed.set_input_size(size)
        if self.pos_embed is not None:
            resampled = resized(self.pos_embed.detach(), before, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers after the last of these, and the head; returns the numbers of what is asked for."""
        taken = take_indices(len(self.encoder.layers), indices)
        self.encoder.layers = self.encoder.layers[: taken[-1] + 1]
        if prune_norm:
            self.encoder.last_norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken


def take_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Rising numbers of layers below depth: all (None), the last n (n), or these, negative ones from the end."""
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"indices must be at most the {depth} layers, and at least 1, got {indices}")
        return list(range(depth - indices, depth))
    found = range(depth) if indices is None else [i + depth if i < 0 else i for i in indices]
    if not found or any(not 0 <= i < depth for i in found):
        raise ValueError(f"indices must be numbers of the {depth} layers, got {indices}")
    return sorted(set(found))


def _check(**given: tuple[Any, tuple[str, ...]]) -> None:
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
