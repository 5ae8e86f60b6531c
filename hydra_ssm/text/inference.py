"""First uses of a trained model: fill masks, and a vector for each text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import HydraConfig
from .heads import HydraForMaskedLM
from .messages import quiet
from .models import HydraPreTrainedModel
from .tokenizer import load_tokenizer

OF_HEADS = ("head.", "decoder.", "pooler.", "classifier.")  # begin the names of their weights
PAIRS = 1 << 22  # of vectors that are compared at once
UNREADABLE = (
    OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError, StrictDataclassError
)  # fmt: skip
TOKENS = 8192  # in a row of texts to embed


class Filling(NamedTuple):
    """A word for a [MASK]."""

    word: str
    probability: float


def load(
    folder: Path, kind: type[HydraPreTrainedModel], **options: Any
) -> tuple[HydraPreTrainedModel, PreTrainedTokenizerBase, bool]:
    """As `load_model`, with the folder's tokenizer in the middle, which must be there too."""
    model, lacks_head = load_model(folder, kind, **options)
    try:
        with quiet():
            return model, load_tokenizer(folder), lacks_head
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error


def load_model(folder: Path, kind: type[HydraPreTrainedModel], **options: Any) -> tuple[HydraPreTrainedModel, bool]:
    """The model of a folder that `save_pretrained` or `hydra-ssm pretrain` wrote as one of `kind`, and whether the
    folder lacks weights of its head. `options` go to `from_pretrained`.

    Raises ValueError where the folder holds no such model, or weights that are not those of its configuration.
    """
    load_config(folder)
    try:
        with quiet():
            loaded: Any = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        model, report = loaded
        _check_weights(report)
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error
    return model.eval(), bool(report["missing_keys"])


def load_config(folder: Path) -> HydraConfig:
    """The configuration of such a folder. Raises ValueError where it holds no model of this library."""
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        unfinished = (folder / "training" / "recipe.json").is_file()
        hint = f": its run has not ended, go on with hydra-ssm pretrain --out {folder} --resume" if unfinished else ""
        raise ValueError(f"{folder} must hold a model (config.json and model.safetensors), it does not{hint}")
    try:
        found = _config(folder).get("model_type")
        if found != HydraConfig.model_type:
            raise ValueError(f"the model_type of config.json must be {HydraConfig.model_type}, got {found}")
        return HydraConfig.from_pretrained(folder)
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> ValueError:
    reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
    return ValueError(f"{folder} holds no model that can be read: {str(reason).splitlines()[0]}")


def saved_kind(folder: Path) -> str:
    """The name of the class that a folder's model was saved from; that of a masked language model where none says."""
    try:
        return str((_config(folder).get("architectures") or [HydraForMaskedLM.__name__])[0])
    except UNREADABLE:
        return HydraForMaskedLM.__name__  # whoever loads it says what is wrong


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


class TextModel:
    """A model and its tokenizer from a folder: see `load`. dtype: None computes in the one that was saved."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        options = {} if dtype is None else {"dtype": dtype}
        found, self.tokenizer, self.lacks_head = load(folder, HydraForMaskedLM, **options)  # as a classifier's encoder
        assert isinstance(found, HydraForMaskedLM)
        self.model = found

    @torch.no_grad()
    def fill(self, text: str, top: int) -> list[list[Filling]]:
        """For each [MASK] of the text the `top` likeliest words, best first.

        Raises ValueError where the text has none, or one beyond what the model takes, or the model no head that was
        trained to predict words.
        """
        if self.lacks_head:
            raise ValueError(
                "the model must be a masked language model, it has no weights of a head that predicts words"
            )
        inputs = self.tokenizer([text], return_tensors="pt", **self._limit())
        masks = inputs["input_ids"] == self.tokenizer.mask_token_id
        wanted = self.tokenizer(text)["input_ids"].count(self.tokenizer.mask_token_id)
        if not wanted:
            raise ValueError(f"the text must hold a {self.tokenizer.mask_token}, got {text!r}")
        if masks.sum() < wanted:
            raise ValueError(
                f"each {self.tokenizer.mask_token} must be among the first {self.model.longest_document} tokens, "
                "which are all that this model takes"
            )
        logits = self.model(**inputs).logits[masks][:, : len(self.tokenizer)]  # the rest pads the vocabulary
        found = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
        return [
            [Filling(str(self.tokenizer.decode([word])), p) for word, p in zip(words, probabilities, strict=True)]
            for words, probabilities in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(texts, hidden_size) float32: the mean of each text's token vectors. Raises ValueError for no text.

        Texts are packed back to back in rows without any padding; a longer one than a row has one to itself.
        """
        if not texts:
            raise ValueError("there must be a text to embed, got none")
        ids = self.tokenizer(list(texts), **self._limit())["input_ids"]
        vectors = torch.empty(len(ids), self.model.config.hidden_size)
        for row in packed_rows([len(text) for text in ids], TOKENS):
            lengths = torch.tensor([len(ids[i]) for i in row])
            tokens = torch.tensor([token for i in row for token in ids[i]])
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) if len(row) > 1 else None
            hidden = self.model.model(tokens[None], cu_seqlens=ends).last_hidden_state[0].float()
            text = torch.arange(len(row)).repeat_interleave(lengths)
            vectors[row] = torch.zeros(len(row), hidden.shape[1]).index_add(0, text, hidden) / lengths[:, None]
        return vectors

    def _limit(self) -> dict[str, object]:
        """Texts are cut where the model takes no longer ones, and else not at all."""
        longest = self.model.longest_document
        return {} if longest is None else {"truncation": True, "max_length": longest}


def packed_rows(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Which of these lengths share a row of at most `most`: like ones, longest first, as some mixers pad documents."""
    rows: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not rows or lengths[i] > room:
            rows.append([])
            room = most
        rows[-1].append(i)
        room -= lengths[i]
    return rows


def _check_weights(report: Mapping[str, Iterable[Any]]) -> None:
    """Raise ValueError unless a checkpoint holds the encoder of its configuration; heads may be missing or others."""
    other = {name for name, *_ in report["mismatched_keys"]}
    other |= {n for n in [*report["missing_keys"], *report["unexpected_keys"]] if not n.startswith(OF_HEADS)}
    if other:
        raise ValueError(f"its weights must be those of its config.json, {min(other)} is not, of {len(other)} in all")


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, also those that hold spaces; where there is none, the lines."""
    parts = re.split(r"\n\s*\n", text.strip())
    return [" ".join(part.split()) for part in (parts if len(parts) > 1 else text.split("\n")) if part.strip()]


def nearest_pairs(vectors: Tensor, count: int) -> list[tuple[int, int, float]]:
    """(i, j, similarity) of the most alike rows of (n, D): the cosine after the mean of all is taken off.

    Of two rows the plain cosine: without their mean they are opposites, whatever they are.
    """
    unit = torch.nn.functional.normalize(vectors - vectors.mean(0) if len(vectors) > 2 else vectors, dim=1)
    size, found = max(1, PAIRS // max(len(unit), 1)), []
    for start in range(0, len(unit), size):  # the rows from `start` with all after each of them
        similarity = unit[start : start + size] @ unit[start:].T
        similarity.masked_fill_(torch.ones_like(similarity, dtype=torch.bool).tril(), -torch.inf)
        best, width = similarity.flatten().topk(min(count, similarity.numel())), similarity.shape[1]
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found += [(start + k // width, start + k % width, s) for k, s in places if k // width < k % width]
    return sorted(found, key=lambda pair: -pair[2])[:count]
