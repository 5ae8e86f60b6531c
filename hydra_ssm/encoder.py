"""A residual stack of mixers: knows neither text nor images."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layer import EncoderLayer
from .matrices import MATRICES
from .mixer import STATE_OPTIONS, Hydra, MatrixMixer, SelfAttention, check_input
from .ops import Documents, Order, Ordering, layout, make_orders, per_document, zero_padding

MixerSpec = str | Mapping[str, Any]
FOR_ATTENTION = {"headdim"}
OPTIONS = FOR_ATTENTION | STATE_OPTIONS | {"d_state", "d_conv", "expand", "ngroups", "max_length", "conv_bias"}


def expand_to(d_inner: int, d_model: int) -> float:
    """The `expand` of a mixer that is as wide as this within: times d_model it is rounded down."""
    expand = d_inner / d_model
    return expand if int(expand * d_model) == d_inner else math.nextafter(expand, math.inf)


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters of a model, or of a mixer alone, that weight decay would harm: see MatrixMixer."""
    mixers = ((name, m) for name, m in model.named_modules() if isinstance(m, MatrixMixer))
    return {f"{name}.{own}".lstrip(".") for name, mixer in mixers for own in mixer.no_weight_decay()}


def make_mixer(spec: MixerSpec, d_model: int, options: Mapping[str, Any]) -> MatrixMixer:
    """The mixer that a layer asks for.

    "hydra", "attention" (the Transformer's), the name of another matrix class (in the gated block), or a mapping of
    MatrixMixer's arguments, which go before `options`.
    """
    if isinstance(spec, Mapping):
        if "matrix" not in spec:
            raise ValueError(f"a mapping of MatrixMixer's arguments must name its matrix, got {dict(spec)}")
        return MatrixMixer(d_model, **{**options, **spec})
    if spec == "hydra":
        return Hydra(d_model, **options)
    if spec == "attention":
        return SelfAttention(d_model, **{name: value for name, value in options.items() if name in FOR_ATTENTION})
    if isinstance(spec, str) and spec in MATRICES:
        return MatrixMixer(d_model, spec, **options)
    names = dict.fromkeys(["hydra", "attention", *MATRICES])
    raise (ValueError if isinstance(spec, str) else TypeError)(
        f"a mixer must be one of {', '.join(names)}, or a mapping of MatrixMixer's arguments, got {spec!r}"
    )


class Encoder(nn.Module):
    """Layers of mixers with residuals: (B, L, d_model) in and out.

    Args:
        mixers: one specification a layer (see `make_mixer`); different ones make a hybrid.
        d_ff: width of the feed-forward networks; 0 for none, as in the paper's models.
        norm: "post" (BERT's and the paper's) or "pre", which adds a last norm.
        dropout: on what each mixer and feed-forward network adds.
        drop_path: how often, in training, a document goes round a branch of the last layer (stochastic depth); evenly
            less before, never in the first.
        d_condition: numbers of a condition, which scales and shifts what each branch reads and scales what it adds (as
            in FiLM and AdaLN), by a linear layer in each that begins at zero: at first it changes nothing.
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
        drop_path: float = 0.0,
        d_condition: int = 0,
        eps: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(mixers, str) or not isinstance(mixers, Sequence):
            raise TypeError(f"mixers must be a list with one for each layer, got {mixers!r}: [{mixers!r}] is one layer")
        if not mixers:
            raise ValueError("an encoder needs at least one mixer, got none")
        if unknown := options.keys() - OPTIONS:
            raise TypeError(f"an encoder has no option {', '.join(sorted(unknown))}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_path}")
        self.d_model, self.d_condition = d_model, d_condition
        self.layers = nn.ModuleList(
            EncoderLayer(
                make_mixer(spec, d_model, options),
                d_ff=d_ff,
                norm=norm,
                dropout=dropout,
                drop_path=drop_path * i / max(1, len(mixers) - 1),
                d_condition=d_condition,
                eps=eps,
            )
            for i, spec in enumerate(mixers)
        )
        self.last_norm = nn.LayerNorm(d_model, eps=eps) if norm == "pre" else nn.Identity()
        self.gradient_checkpointing = False  # recompute each layer for its gradient: less memory, a third more time
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # transformers sets its own

    def forward(
        self,
        h: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        order: Ordering | Sequence[Ordering] | None = None,
        condition: Tensor | None = None,
        every_layer: bool = False,
        states: Collection[int] | None = None,
    ) -> Tensor:
        """Encode h (B, L, d_model). `mask` and `cu_seqlens` as in MatrixMixer.

        Args:
            order: in which order the mixers read the tokens, which come out where they were: a permutation of
                0 ... L - 1, for all rows (L,) or for each (B, L); or K of them, (K, 1 or B, L), along each of which
                every mixer mixes, with the same weights, and adds what they give: K times its time, no parameters. A
                sequence of such: the layers take them in turn. `ops.Order.of(order)` in place of a tensor is checked
                once, not in each call. None: as they are.
            condition: (B, d_condition), or with cu_seqlens (documents, d_condition). None: it changes nothing.
            every_layer: return the input and what each layer gives, (B, L, layers + 1, d_model).
            states: return these of them alone, (B, L, states, d_model), all before the last norm, in rising order: 0
                is the input. No layer after the last of them is run.

        Raises:
            ValueError, TypeError: what is given does not fit together.
        """
        check_input(h, self.d_model)
        self._check(h, cu_seqlens, order, condition)
        if every_layer and states is not None:
            raise ValueError(f"states must come without every_layer, which gives all of them, got {list(states)}")
        depth = len(self.layers)
        kept = set(range(depth + 1)) if every_layer else {depth} if states is None else _numbers(states, depth)
        orders = [None] if order is None else make_orders(order, (h.shape[0], h.shape[1]))
        found: list[Tensor] = []
        for layers in _stretches(max(1, *kept), len(orders)):
            one = orders[layers.start % len(orders)]
            first = 0 if layers.start == 0 else layers.start + 1  # the input is a state of its own
            numbers = [n for n in range(first, layers.stop + 1) if n in kept or n == layers.stop]
            run = partial(self._layers, layers, numbers, normed=states is None, condition=condition)
            if one is not None and one.count > 1:
                if mask is not None and mask.dtype != torch.bool:
                    layout((h.shape[0], h.shape[1]), mask, None)  # raises
                parts = zero_padding(run(zero_padding(h, mask), None, order=one, mask=mask), mask).unbind(2)
            elif one is not None:
                rows = per_document(run, one.take(h), None if mask is None else one.take(mask), None)
                parts = one.restore(rows).unbind(2)
            else:
                parts = per_document(run, h, mask, cu_seqlens).unbind(2)
            found += [part for part, number in zip(parts, numbers, strict=True) if number in kept]
            h = parts[-1]
        return torch.stack(found, dim=2) if every_layer or states is not None else h

    def _layers(
        self,
        layers: range,
        numbers: Sequence[int],
        h: Tensor,
        documents: Documents | None,
        *,
        normed: bool,
        condition: Tensor | None,
        order: Order | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The states of these numbers, (B, L, states, d_model), that consecutive layers make of h (B, L, d_model)."""
        states = {layers.start: h}
        for i in layers:
            given = states[i], documents, condition, order, mask
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                states[i + 1] = self._gradient_checkpointing_func(self.layers[i], *given)
            else:
                states[i + 1] = self.layers[i](*given)
        if normed and len(self.layers) in states:
            states[len(self.layers)] = self.last_norm(states[len(self.layers)])
        return (
            states[numbers[0]].unsqueeze(2) if len(numbers) == 1 else torch.stack([states[n] for n in numbers], dim=2)
        )

    def _check(self, h: Tensor, cu_seqlens: Tensor | None, order: object, condition: Tensor | None) -> None:
        if order is not None and cu_seqlens is not None:
            raise ValueError("order must come without cu_seqlens: give each document a row, and padding a mask")
        if condition is None:
            return
        if not self.d_condition:
            raise ValueError("this encoder was made without d_condition and takes no condition")
        wanted = (len(h) if cu_seqlens is None else len(cu_seqlens) - 1, self.d_condition)
        if tuple(condition.shape) != wanted:
            raise ValueError(f"condition must be (documents, d_condition) = {wanted}, got {tuple(condition.shape)}")


def _stretches(layers: int, orders: int) -> list[range]:
    """Layers that one pass over the batch can take: all, or one by one where they take several orders in turn."""
    return [range(layers)] if orders == 1 else [range(i, i + 1) for i in range(layers)]


def _numbers(states: Collection[int], depth: int) -> set[int]:
    wrong = [n for n in states if not 0 <= n <= depth]
    if wrong or not states:
        raise ValueError(f"states must be numbers from 0 to {depth}, got {list(states)}")
    return set(states)
