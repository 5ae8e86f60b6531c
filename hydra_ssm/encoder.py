"""A residual stack of mixers: knows neither text nor images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .matrices import MATRICES
from .mixer import STATE_OPTIONS, Hydra, MatrixMixer, SelfAttention, check_input
from .ops import Documents, per_document

MixerSpec = str | Mapping[str, Any]
FOR_ATTENTION = {"headdim"}
OPTIONS = FOR_ATTENTION | STATE_OPTIONS | {"d_state", "d_conv", "expand", "ngroups", "max_length", "conv_bias"}


def make_mixer(spec: MixerSpec, d_model: int, options: Mapping[str, Any]) -> MatrixMixer:
    """The mixer that a layer asks for.

    "hydra", "attention" (the Transformer's), the name of another matrix class (in the gated block), or a mapping of
    MatrixMixer's arguments, which go before `options`.
    """
    if not isinstance(spec, str):
        if "matrix" not in spec:
            raise ValueError(f"a mapping of MatrixMixer's arguments must name its matrix, got {dict(spec)}")
        return MatrixMixer(d_model, **{**options, **spec})
    if spec == "hydra":
        return Hydra(d_model, **options)
    if spec == "attention":
        return SelfAttention(d_model, **{name: value for name, value in options.items() if name in FOR_ATTENTION})
    if spec in MATRICES:
        return MatrixMixer(d_model, spec, **options)
    names = dict.fromkeys(["hydra", "attention", *MATRICES])
    raise ValueError(
        f"a mixer must be one of {', '.join(names)}, or a mapping of MatrixMixer's arguments, got {spec!r}"
    )


class EncoderLayer(nn.Module):
    """Mixer, then a feed-forward network if `d_ff`; each with a residual and a LayerNorm, after it or before it."""

    def __init__(
        self,
        mixer: MatrixMixer,
        *,
        d_ff: int = 0,
        norm: Literal["post", "pre"] = "post",
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.mixer = mixer
        self.norm = nn.LayerNorm(mixer.d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = None
        if d_ff:
            self.feed_forward = nn.Sequential(
                nn.Linear(mixer.d_model, d_ff), nn.GELU(), nn.Linear(d_ff, mixer.d_model), nn.Dropout(dropout)
            )
            self.feed_forward_norm = nn.LayerNorm(mixer.d_model, eps=eps)

    def forward(self, h: Tensor, documents: Documents | None = None) -> Tensor:
        """One layer on h (B, L, d_model) in one of the forms of `Documents`."""
        if self.pre:
            h = h + self.dropout(self.mixer(self.norm(h), documents=documents))
            return h if self.feed_forward is None else h + self.feed_forward(self.feed_forward_norm(h))
        h = self.norm(h + self.dropout(self.mixer(h, documents=documents)))
        return h if self.feed_forward is None else self.feed_forward_norm(h + self.feed_forward(h))


class Encoder(nn.Module):
    """Layers of mixers with residuals: (B, L, d_model) in and out.

    Args:
        mixers: one specification a layer (see `make_mixer`); different ones make a hybrid.
        d_ff: width of the feed-forward networks; 0 for none, as in the paper's models.
        norm: "post" (BERT's and the paper's) or "pre", which adds a last norm.
        dropout: on what each mixer and feed-forward network adds.
        options: arguments of MatrixMixer for all layers.
    """

    def __init__(
        self,
        d_model: int,
        mixers: Sequence[MixerSpec],
        *,
        d_ff: int = 0,
        norm: Literal["post", "pre"] = "post",
        dropout: float = 0.0,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__()
        if not mixers:
            raise ValueError("an encoder needs at least one mixer, got none")
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"an encoder has no option {', '.join(sorted(unknown))}")
        if norm not in ("post", "pre"):
            raise ValueError(f"norm must be 'post' or 'pre', got {norm!r}")
        self.d_model = d_model
        self.layers = nn.ModuleList(
            EncoderLayer(make_mixer(spec, d_model, options), d_ff=d_ff, norm=norm, dropout=dropout, eps=eps)
            for spec in mixers
        )
        self.last_norm = nn.LayerNorm(d_model, eps=eps) if norm == "pre" else nn.Identity()
        self.gradient_checkpointing = False  # recompute each layer for its gradient: less memory, a third more time
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # transformers sets its own

    def forward(
        self, h: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, *, every_layer: bool = False
    ) -> Tensor:
        """Encode h (B, L, d_model). `mask` and `cu_seqlens` as in MatrixMixer.

        every_layer: return the input and what each layer gives, (B, L, layers + 1, d_model).
        """
        check_input(h, self.d_model)

        def stack(h: Tensor, documents: Documents | None) -> Tensor:
            states = [h]
            for layer in self.layers:
                states.append(self._run(layer, states[-1], documents))
            states[-1] = self.last_norm(states[-1])
            return torch.stack(states, dim=2) if every_layer else states[-1]

        return per_document(stack, h, mask, cu_seqlens)

    def _run(self, layer: nn.Module, h: Tensor, documents: Documents | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, h, documents)
        return layer(h, documents)
