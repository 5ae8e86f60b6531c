"""The text encoder as a transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from ..encoder import Encoder
from ..mixer import MatrixMixer
from ..ops import layout, zero_padding
from ..ops.backend import has_values
from ..pretrained import IN_FLOAT32, initialize_mixers
from .config import HydraConfig

F = TypeVar("F", bound=Callable[..., Any])


class HydraInputs(TypedDict, total=False):
    """What every model takes besides input_ids, attention_mask and token_type_ids; B rows of L tokens."""

    position_ids: Tensor | None  # (B, L) int; None: places in the document. Not used without learned positions
    inputs_embeds: Tensor | None  # (B, L, hidden_size), instead of input_ids
    cu_seqlens: Tensor | None  # (documents + 1,) offsets of documents packed in one row, B = 1; None reads another
    output_hidden_states: bool | None
    output_attentions: bool | None  # there are none: True raises ValueError
    return_dict: bool | None


def names_inputs(forward: F) -> F:
    """Put HydraInputs' names into a signature: Trainer drops what it does not find there from its batches."""
    signature = inspect.signature(forward)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in HydraInputs.__annotations__
    ]
    forward.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
    return forward


class HydraPreTrainedModel(PreTrainedModel):
    """How transformers initialises, loads and saves these models."""

    config_class = HydraConfig
    config: HydraConfig
    base_model_prefix = "model"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # attention layers call it
    _no_split_modules = ["HydraEmbeddings", "EncoderLayer"]  # noqa: RUF012 - transformers copies it
    _keep_in_fp32_modules_strict = list(IN_FLOAT32)  # noqa: RUF012

    @property
    def longest_document(self) -> int | None:
        """Tokens of the longest document that learned positions and fixed mixers take; None: any are taken."""
        fixed = [m for m in self.modules() if isinstance(m, MatrixMixer) and not m.data_dependent]
        limits = [m.settings.max_length for m in fixed]
        if self.config.position_embeddings:
            limits.append(self.config.max_position_embeddings)
        return min(limits, default=None)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """BERT's initialisation, but torch's own for the convolution; what a checkpoint filled stays."""
        if isinstance(module, nn.Conv1d):
            module.reset_parameters()  # transformers guards the functions that it calls
        else:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        """As transformers does, and the mixers' own for what they mix with."""
        initialize_mixers(self, super().initialize_weights)


class HydraEmbeddings(nn.Module):
    """LayerNorm of word + token type [+ position], then dropout."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.position_embeddings = None
        if config.position_embeddings:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(
        self,
        words: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """(B, L, D) from the words' vectors (B, L, D)."""
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        h = words + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            h = h + self._place(words, position_ids, mask, cu_seqlens)
        return self.dropout(self.norm(h))

    def _place(
        self, words: Tensor, position_ids: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        assert self.position_embeddings is not None
        most, place = self.position_embeddings.num_embeddings, position_ids
        if place is None:
            place = positions(words, mask, cu_seqlens)
            if place.shape[-1] > most and has_values() and place.max() >= most:
                longest = int(place.max()) + 1
                raise ValueError(
                    f"documents must be at most max_position_embeddings = {most} tokens long, got {longest}"
                )
        elif has_values() and (place.min() < 0 or place.max() >= most):
            raise ValueError(
                f"position_ids must be at least 0 and below max_position_embeddings = {most}, "
                f"got {int(place.min())} to {int(place.max())}"
            )
        return self.position_embeddings(place)


def positions(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B, L) place of each token of h (B, L, D) in its document, padding not counted."""
    B, L = h.shape[:2]
    place = layout((B, L), mask, cu_seqlens)
    if place is None:
        return torch.arange(L, device=h.device).expand(B, L)
    return place.restore(place.documents.positions)


class HydraModel(HydraPreTrainedModel):
    """Embeddings and an encoder: one vector a token."""

    _keys_to_ignore_on_load_unexpected = [r"^head\.", r"^decoder\."]  # noqa: RUF012 - of a masked LM, not used here

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.embeddings = HydraEmbeddings(config)
        self.encoder = Encoder(
            config.hidden_size,
            config.layer_mixers,
            d_ff=config.intermediate_size,
            norm=config.norm,
            dropout=config.hidden_dropout,
            eps=config.layer_norm_eps,
            **config.mixer_options,
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutput:
        """Encode B rows of L tokens: last_hidden_state (B, L, hidden_size), zero at padding.

        Args:
            input_ids: (B, L) int.
            attention_mask: (B, L), not 0 for tokens, at any place; None: all are. Padding has no influence.
            token_type_ids: (B, L) int; None: 0.
            output_hidden_states: give hidden_states too, the embeddings and what each layer gives.
            position_ids, inputs_embeds, cu_seqlens: see HydraInputs.

        Raises:
            ValueError: inputs that do not fit together, or output_attentions.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions must be False: these mixers have no attention maps, "
                "hydra_ssm.inspection.mixing_matrices gives what they mix with"
            )
        mask = _mask(attention_mask, self._shape(input_ids, inputs_embeds))
        words = (
            self.embeddings.word_embeddings(input_ids) if inputs_embeds is None else zero_padding(inputs_embeds, mask)
        )
        h = self.embeddings(words, token_type_ids, position_ids, mask, cu_seqlens)
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            states = self.encoder(h, mask, cu_seqlens, every_layer=True).unbind(2)
            return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)
        return BaseModelOutput(last_hidden_state=self.encoder(h, mask, cu_seqlens))

    def _shape(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, ...]:
        """(B, L) of the one that is given."""
        if input_ids is not None and inputs_embeds is None:
            if input_ids.ndim != 2 or 0 in input_ids.shape:
                raise ValueError(f"input_ids must be (batch, length), none of them 0, got {tuple(input_ids.shape)}")
            return tuple(input_ids.shape)
        if inputs_embeds is None or input_ids is not None:
            raise ValueError("give input_ids or inputs_embeds, one of them")
        D, got = self.config.hidden_size, tuple(inputs_embeds.shape)
        if len(got) != 3 or got[2] != D or 0 in got:
            raise ValueError(f"inputs_embeds must be (batch, length, hidden_size = {D}), none of them 0, got {got}")
        return got[:2]


def _mask(attention_mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """True for tokens; None where all are, which is faster."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask must be (batch, length) = {shape}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    if not has_values():
        return mask
    if attention_mask.is_floating_point() and (least := attention_mask.min()) < 0:
        raise ValueError(f"attention_mask must be 1 for tokens and 0 for padding, got {least:g}: what adds to scores?")
    return None if mask.all() else mask
