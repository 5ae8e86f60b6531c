"""Models with a task on top of the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from ..ops import layout
from .collators import IGNORED
from .config import HydraConfig
from .models import HydraInputs, HydraModel, HydraPreTrainedModel, names_inputs


def _named(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What goes on to HydraModel, whose outputs the heads read by name."""
    return {**inputs, "return_dict": True}


def _wide(logits: Tensor) -> Tensor:
    """For a loss: float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _labels(config: HydraConfig) -> int:
    assert config.num_labels is not None  # 2 where the user says nothing
    return config.num_labels


class MaskedLMHead(nn.Module):
    """BERT's: dense, GELU, LayerNorm."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, h: Tensor) -> Tensor:
        """(..., hidden_size) in and out."""
        return self.norm(F.gelu(self.dense(h)))


class HydraForMaskedLM(HydraPreTrainedModel):
    """Predicts words with BERT's head and a decoder that is tied to the embeddings, with a bias."""

    _tied_weights_keys = {"decoder.weight": "model.embeddings.word_embeddings.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.head = MaskedLMHead(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.decoder = new_embeddings

    @names_inputs
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Unpack[HydraInputs],
    ) -> MaskedLMOutput:
        """Logits (B, L, vocab_size), with labels the loss.

        Args:
            labels: (B, L) the words to predict, -100 elsewhere. In training mode logits are then (n, vocab_size), of
                the n labelled tokens in the order of `labels[labels != -100]`: the others cost no decoding.
            num_items_in_batch: divide the summed loss by this many instead of n, as gradient accumulation needs.
            inputs: see HydraInputs.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, **_named(inputs))
        h, loss = outputs.last_hidden_state, None
        if labels is not None:
            if labels.shape != h.shape[:2]:
                raise ValueError(f"labels must be (batch, length) = {tuple(h.shape[:2])}, got {tuple(labels.shape)}")
            chosen = labels != IGNORED
            h, labels = (h[chosen], labels[chosen]) if self.training else (h, labels)
        logits = self.predict(h)
        if labels is not None:
            count = chosen.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            loss = F.cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), reduction="sum") / count.clamp(min=1)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def predict(self, h: Tensor) -> Tensor:
        """Logits (..., vocab_size) of hidden states (..., hidden_size)."""
        return self.decoder(self.head(h))


class _Pooled(HydraPreTrainedModel):
    """A classifier of each document's first token ([CLS]), as in BERT: dense, tanh, dropout, linear."""

    accepts_loss_kwargs = False

    def __init__(self, config: HydraConfig, outputs: int) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, outputs)
        self.post_init()

    def classify(self, h: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Logits (documents, outputs) of hidden states h (B, L, hidden_size)."""
        first = first_tokens(h, attention_mask, cu_seqlens)
        return self.classifier(self.dropout(self.pooler(first).tanh()))


def first_tokens(h: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(documents, D) the vector of each document's first token in h (B, L, D); zero for a document without tokens."""
    mask = None if attention_mask is None else attention_mask.bool()
    place = layout((h.shape[0], h.shape[1]), mask, cu_seqlens)
    if place is None:
        return h[:, 0]
    inner, starts = place.take(h), place.documents.cu_seqlens
    if starts is None:
        return inner[:, 0]
    first = inner[0, starts[:-1].clamp(max=inner.shape[1] - 1)]
    return torch.where(starts.diff()[:, None] > 0, first, torch.zeros((), dtype=h.dtype, device=h.device))


class HydraForSequenceClassification(_Pooled):
    """One of num_labels classes a document, several of them, or numbers (num_labels = 1, or problem_type)."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config, _labels(config))

    @names_inputs
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Unpack[HydraInputs],
    ) -> SequenceClassifierOutput:
        """Logits (documents, num_labels), a document being a row, or a part of one that cu_seqlens names.

        Args:
            labels: (documents,) int classes; (documents, num_labels) float 0 or 1 for several; float for regression.
            inputs: see HydraInputs.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, **_named(inputs))
        logits = self.classify(outputs.last_hidden_state, attention_mask, inputs.get("cu_seqlens"))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, _wide(logits), self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HydraForMultipleChoice(_Pooled):
    """Which of several continuations fits: a number for each, softmax over them."""

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config, 1)

    @names_inputs
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Unpack[HydraInputs],
    ) -> MultipleChoiceModelOutput:
        """Logits (B, choices). Inputs are as in HydraInputs with choices after B: (B, choices, L); none are packed.

        Args:
            labels: (B,) int, the right choice.
        """
        embedded = inputs.get("inputs_embeds")
        given = input_ids if embedded is None else embedded[..., 0]
        if inputs.get("cu_seqlens") is not None:
            raise ValueError("cu_seqlens must be None: multiple choice takes no packed rows")
        if given is None or given.ndim != 3:
            got = "none" if given is None else tuple(given.shape if embedded is None else embedded.shape)
            raise ValueError(
                f"input_ids must be (batch, choices, length), or inputs_embeds with hidden_size after that, got {got}"
            )
        mask, flat = _rows(attention_mask), {name: _rows(value) for name, value in inputs.items()}
        outputs = self.model(_rows(input_ids), mask, _rows(token_type_ids), **_named(flat))
        logits = self.classify(outputs.last_hidden_state, mask, None).view(-1, given.shape[1])
        loss = None if labels is None else F.cross_entropy(_wide(logits), labels)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def _rows(value: Any) -> Any:
    """Choices as rows: (B, choices, ...) to (B choices, ...)."""
    return value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim > 2 else value


class HydraForTokenClassification(HydraPreTrainedModel):
    """One of num_labels classes a token."""

    accepts_loss_kwargs = False

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, _labels(config))
        self.post_init()

    @names_inputs
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Unpack[HydraInputs],
    ) -> TokenClassifierOutput:
        """Logits (B, L, num_labels). labels: (B, L) int, -100 where there is none. inputs: see HydraInputs."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, **_named(inputs))
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HydraForQuestionAnswering(HydraPreTrainedModel):
    """Where in the text the answer starts and ends."""

    accepts_loss_kwargs = False

    def __init__(self, config: HydraConfig) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.classifier = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @names_inputs
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs: Unpack[HydraInputs],
    ) -> QuestionAnsweringModelOutput:
        """start_logits and end_logits (B, L). The positions: (B,) int; beyond the text they are ignored."""
        outputs = self.model(input_ids, attention_mask, token_type_ids, **_named(inputs))
        start, end = (t.contiguous() for t in self.classifier(outputs.last_hidden_state).unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(_wide(start), _wide(end), start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=outputs.hidden_states
        )
