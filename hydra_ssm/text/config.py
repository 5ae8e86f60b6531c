"""Sizes of a text encoder, and the presets they go by."""

# No `from __future__ import annotations` here: it makes types strings, and those @strict does not check.

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..encoder import make_mixer
from ..matrices import MATRICES


@strict
class HydraConfig(PreTrainedConfig):
    """Sizes of a bidirectional text encoder of any matrix mixers. The defaults are the preset hydra-base.

    Args:
        mixers: what mixes the tokens, for all layers or in a list with one entry a layer (a hybrid): "hydra",
            "attention" (the Transformer's), the name of a matrix class, or a mapping of MatrixMixer's arguments such as
            {"matrix": "low_rank", "data_dependent": False}. See `hydra_ssm.Encoder`.
        num_hidden_layers: 23, or as many as the list of mixers has.
        d_state, d_conv, expand, headdim, ngroups: as in MatrixMixer, for the layers whose mixers do not say otherwise.
        intermediate_size: width of the feed-forward networks, 0 for none.
        norm: "post" or "pre".
        embedding_dropout: on the embeddings.
        hidden_dropout: on what each mixer and feed-forward network adds.
        classifier_dropout: before the heads' classifiers.
        position_embeddings: whether each token gets a learned vector of its place in its document. Mixers that read
            order from the data need none.
        max_position_embeddings: longest document of learned positions and of fixed mixers, and the length that some
            data-dependent ones scale by. -1 where neither limits it: any length, trained on or not.

    Raises:
        ValueError: sizes that do not fit together, or an unknown mixer.
        StrictDataclassFieldValidationError: a value of another type, as transformers' own configurations do.
    """

    model_type = "hydra_ssm"

    vocab_size: int = 30528  # bert-base-uncased's 30522, padded to a multiple of 8
    hidden_size: int = 768
    num_hidden_layers: int | None = None
    mixers: str | dict[str, Any] | list[str | dict[str, Any]] = "hydra"
    d_state: int = 64
    d_conv: int = 7
    expand: float | int = 2
    headdim: int = 64
    ngroups: int = 1
    intermediate_size: int = 0
    norm: Literal["post", "pre"] = "post"
    embedding_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    layer_norm_eps: float | int = 1e-5
    position_embeddings: bool = False
    max_position_embeddings: int = -1
    type_vocab_size: int = 2
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.mixers, list):
            self.num_hidden_layers = self.num_hidden_layers or len(self.mixers)
        elif self.num_hidden_layers is None:
            self.num_hidden_layers = 23
        super().__post_init__(**kwargs)
        self._check_numbers()
        self._check_mixers()

    @property
    def layer_mixers(self) -> list[str | dict[str, Any]]:
        """One mixer a layer."""
        assert self.num_hidden_layers is not None
        return self.mixers if isinstance(self.mixers, list) else [self.mixers] * self.num_hidden_layers

    @property
    def mixer_options(self) -> dict[str, Any]:
        """Arguments of MatrixMixer for all layers."""
        names = ("d_state", "d_conv", "expand", "headdim", "ngroups")
        options = {name: getattr(self, name) for name in names}
        if self.max_position_embeddings > 0:
            options["max_length"] = self.max_position_embeddings
        return options

    def _check_numbers(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "type_vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.intermediate_size < 0:
            raise ValueError(f"intermediate_size must be 0 (no feed-forward) or more, got {self.intermediate_size}")
        for name in ("embedding_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size = {self.vocab_size}, got {self.pad_token_id}")
        if self.max_position_embeddings < 1 and self.max_position_embeddings != -1:
            raise ValueError(f"max_position_embeddings must be at least 1, or -1, got {self.max_position_embeddings}")
        if self.position_embeddings and self.max_position_embeddings == -1:
            raise ValueError("position_embeddings needs max_position_embeddings, the longest document, got -1")

    def _check_mixers(self) -> None:
        if len(self.layer_mixers) != self.num_hidden_layers:
            raise ValueError(
                f"mixers must name one a layer, num_hidden_layers = {self.num_hidden_layers}, "
                f"got {len(self.layer_mixers)}"
            )
        for spec in _distinct(self.layer_mixers):
            try:
                with torch.device("meta"):  # the mixer knows its own rules; this holds no memory
                    mixer = make_mixer(spec, self.hidden_size, self.mixer_options)
            except TypeError as error:
                raise ValueError(f"mixers must be made of arguments of MatrixMixer, got {spec!r}: {error}") from error
            if not mixer.data_dependent and "max_length" not in (self.mixer_options | _mapping(spec)):
                raise ValueError(f"a fixed mixer needs max_position_embeddings, the longest document: {spec!r}")


def _distinct(specs: Sequence[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
    return [spec for i, spec in enumerate(specs) if spec not in specs[:i]]


def _mapping(spec: str | dict[str, Any]) -> dict[str, Any]:
    return {} if isinstance(spec, str) else spec


_BERT = {
    "mixers": "attention",
    "expand": 1,
    "position_embeddings": True,
    "max_position_embeddings": 512,
    "hidden_dropout": 0.1,
}

# The state sizes of the released ablation: per head for queries and keys, for the layer where a state is shared.
_ABLATION_STATE = {"attention": 16, "low_rank": 16, "cauchy": 16, "vandermonde": 16, "quasiseparable_shared": 192}


def _ablation(matrix: str, data_dependent: bool) -> dict[str, Any]:
    """The 12 layers of the paper's Tables 2 and 3 with one matrix class, for documents up to 128 tokens."""
    return {
        "mixers": {"matrix": matrix, "data_dependent": data_dependent},
        "d_state": _ABLATION_STATE.get(matrix, 64),
        "num_hidden_layers": 12,
        "max_position_embeddings": 128,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "hydra-base": {},
    "bert-base": {**_BERT, "num_hidden_layers": 12, "intermediate_size": 3072},
    "hydra-tiny": {"hidden_size": 128, "num_hidden_layers": 4, "d_state": 32, "headdim": 32},
    "bert-tiny": {**_BERT, "hidden_size": 128, "num_hidden_layers": 2, "headdim": 32, "intermediate_size": 512},
    "hydra-large": {"hidden_size": 1024, "num_hidden_layers": 45},
    "bert-large": {**_BERT, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
    "hydra-medium": {"hidden_size": 512, "num_hidden_layers": 13},
    "bert-medium": {**_BERT, "hidden_size": 512, "num_hidden_layers": 7, "intermediate_size": 2048},
    "hydra-small": {"hidden_size": 384, "num_hidden_layers": 11},
    "bert-small": {**_BERT, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "hydra-12": {"num_hidden_layers": 12},
    **{f"{name}-12": _ablation(name, True) for name, matrix in MATRICES.items() if matrix.data_dependent},
    **{f"{name}-12-fixed": _ablation(name, False) for name, matrix in MATRICES.items() if matrix.fixed},
}


# Fields that no weight and no product depends on, or that follow from a tokenizer.
_NO_SIZES = {
    "vocab_size", "pad_token_id", "embedding_dropout", "hidden_dropout", "classifier_dropout", "initializer_range",
    "num_hidden_layers", "mixers",
}  # fmt: skip


def differences(config: HydraConfig, other: HydraConfig) -> list[str]:
    """Names of what sets two models apart, whatever their words, their dropout and how they were initialised."""
    names = [name for name in HydraConfig.__annotations__ if name not in _NO_SIZES]
    return [
        name for name in ["num_hidden_layers", "layer_mixers", *names] if getattr(config, name) != getattr(other, name)
    ]


def preset(name: str, **changes: Any) -> HydraConfig:
    """The configuration of a preset, with `changes` to its fields.

    - hydra-base: 23 Hydra layers, 112M parameters, the paper's Table 4.
    - bert-base: 12 layers of attention and feed-forward networks with learned positions, the baseline: 110M. Dropout is
      BERT's but for the attention weights, which have none.
    - hydra-large, bert-large: BERT's large size, 24 layers of width 1024, and the 45 Hydra layers of that width that
      come nearest to its parameters; 334M and 335M.
    - hydra-medium, bert-medium: width 512, 13 layers against 7; 38.7M and 38.3M.
    - hydra-small, bert-small: width 384, 11 layers against 6; 23.0M and 22.7M.
    - hydra-tiny, bert-tiny: of one size, for a few minutes on a CPU.
    - hydra-12 and MATRIX-12, MATRIX-12-fixed: 12 layers of width 768, about 70M, the paper's ablations; up to 128
      tokens, data dependent or fixed. A class of your own, once it is in `hydra_ssm.MATRICES`:
      `preset("hydra-12", mixers="mine")`.

    Raises:
        ValueError: there is no such preset, the message lists the names; or no such field.
    """
    if name not in PRESETS:
        raise ValueError(f"a preset must be one of {', '.join(PRESETS)}, got {name!r}")
    known = {field.name for field in fields(HydraConfig)} | {"num_labels"}
    if unknown := changes.keys() - known:
        raise ValueError(f"HydraConfig has no field {', '.join(sorted(unknown))}")
    return HydraConfig(**{**PRESETS[name], **changes})
