"""From text to what a run is made of: tokenizer, configuration, and packed rows, all on disk."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..text import HydraConfig, HydraForMaskedLM, preset
from ..text.collators import MaskedLMCollator
from ..text.tokenizer import load_tokenizer, train_tokenizer
from .baseline import Score, token_counts, unigram
from .checkpoints import MANIFEST
from .data.shards import ShardRows, TokenSequence, is_shards, sha256, verify
from .errors import UserError
from .packing import PackedRows, pieces
from .recipe import Recipe
from .rows import EvaluationRows, TrainingRows
from .sources import Corpus, open_corpus, open_texts
from .start import Start
from .trainer import arguments

EVALUATION_RATE = 0.15  # of the held-out tokens are hidden
MOST_UNKNOWN, SOME_UNKNOWN = 0.5, 0.05  # of the words: no text for this tokenizer; worth a warning
SHARDS = "shards.json"  # in place of train/: where the rows are, and what they were when the run began
TOKENIZER_TEXT = 50_000_000  # characters that a tokenizer is trained on; more of them change it little


def prepare(recipe: Recipe, folder: Path) -> None:
    """Fill a new folder with recipe.json, config.json, tokenizer/, train/ and held_out/; where the run begins with the
    weights of a model, with these, too.

    Raises UserError where the recipe, the text or the tokenizer is no good: all that a run reads is read once.
    """
    start = Start(recipe.model, recipe.preset, recipe.seed) if recipe.model is not None else None
    config = _config(recipe, start)
    if any(map(is_shards, recipe.sources)):
        tokenizer = _from_shards(recipe, folder, start)
    else:
        tokenizer = _from_text(recipe, folder, start)
    if start is None:
        config.vocab_size = -(-len(tokenizer) // 8) * 8
        config.pad_token_id = tokenizer.pad_token_id
    if config.max_position_embeddings > 0:
        tokenizer.model_max_length = config.max_position_embeddings  # where truncation=True cuts
    (start.model if start else config).save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "recipe.json").write_text(recipe.to_json(), encoding="utf-8")
    arguments(recipe, folder)
    Prepared(recipe, folder)


def _from_text(recipe: Recipe, folder: Path, start: Start | None) -> PreTrainedTokenizerBase:
    """Rows of the recipe's text, and their tokenizer."""
    corpus = open_corpus(recipe.sources, recipe.held_out, recipe.column)
    if start is None:
        tokenizer = make_tokenizer(recipe, corpus)
    else:
        given = None if recipe.tokenizer is None else make_tokenizer(recipe, corpus)
        tokenizer = start.tokenizer(
            given, f"the tokenizer {recipe.tokenizer}", "leave it out, or begin without --model"
        )
    for name, held_out in (("train", False), ("held_out", True)):
        _write(folder / name, (text for is_held_out, text in corpus if is_held_out == held_out), tokenizer, recipe)
        _check_rows(PackedRows(folder / name), recipe, tokenizer, held_out)
    return tokenizer


def _from_shards(recipe: Recipe, folder: Path, start: Start | None) -> PreTrainedTokenizerBase:
    """The tokenizer of shards, whose rows stay where they are. Those held out are theirs, or of the recipe's text."""
    if len(recipe.sources) > 1:
        raise UserError(f"shards must be the only source, got {', '.join(recipe.sources)}: prepare them together")
    if recipe.tokenizer is not None:
        raise UserError(f"shards have the tokenizer that made them, got another, {recipe.tokenizer}: leave it out")
    shards = Path(recipe.sources[0]).expanduser().resolve()
    manifest = verify(shards)
    if manifest["settings"]["length"] != recipe.length:
        raise UserError(f"length must be {manifest['settings']['length']}, that of the shards, got {recipe.length}")
    if not recipe.held_out and not manifest["splits"]["held_out"]["tokens"]:
        raise UserError(
            f"{shards} must hold out text to evaluate on, it holds out none: prepare it again with a larger --held-out "
            "(or --documents paragraph), or give --held-out here"
        )
    tokenizer = load_tokenizer(shards / "tokenizer")
    if start is not None:
        again = f"prepare the text again with hydra-ssm data prepare ... --tokenizer {shlex.quote(str(start.folder))}"
        start.tokenizer(tokenizer, f"the tokenizer of the shards {recipe.sources[0]}", again)
    _check_rows(ShardRows(shards, "train"), recipe, tokenizer, held_out=False)
    if recipe.held_out:
        texts = (text for texts in open_texts(recipe.held_out, recipe.column) for text in texts)
        _write(folder / "held_out", texts, tokenizer, recipe)
    rows = PackedRows(folder / "held_out") if recipe.held_out else ShardRows(shards, "held_out")
    _check_rows(rows, recipe, tokenizer, held_out=True)
    facts = {"folder": str(shards), "manifest": sha256(shards / MANIFEST)}
    (folder / SHARDS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _write(folder: Path, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    PackedRows.write(folder, pieces(texts, tokenizer, recipe.length), recipe.length)


def _check_rows(
    rows: PackedRows | ShardRows, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: bool
) -> None:
    if len(rows.tokens):  # of words that are not known, more would not help
        check_known(rows.tokens, tokenizer)
    _check_enough(rows, recipe, held_out)


def _open_rows(folder: Path, check: bool) -> dict[str, PackedRows | ShardRows]:
    """Of both splits. Raises UserError where shards have changed since the run began; without `check` nobody looks."""
    names = ("train", "held_out")
    if not (folder / SHARDS).exists():
        return {name: PackedRows(folder / name) for name in names}
    facts = json.loads((folder / SHARDS).read_text(encoding="utf-8"))
    shards = Path(facts["folder"])
    if check:
        verify(shards)
    if sha256(shards / MANIFEST) != facts["manifest"]:
        raise UserError(f"{shards} must be the shards that the run began with, they were prepared anew since")
    return {name: PackedRows(folder / name) if (folder / name).exists() else ShardRows(shards, name) for name in names}


def check_known(tokens: NDArray[np.integer] | TokenSequence, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer has tokens for the text: [UNK] alone teaches nothing. Warns or raises UserError where it lacks."""
    counts = token_counts(tokens, len(tokenizer))
    unknown = int(counts[tokenizer.unk_token_id])
    words = len(tokens) - int(counts[tokenizer.all_special_ids].sum()) + unknown
    if unknown > MOST_UNKNOWN * words or not words:
        raise UserError(
            f"the tokenizer must know the text, it finds {words:,} words or parts of words in it and has a token for "
            f"{words - unknown:,} of them: leave out --tokenizer or --model to train one, and put spaces into "
            "words of more than 100 letters, as sequences of DNA or proteins are (docs/data.md)"
        )
    if unknown > SOME_UNKNOWN * words:
        warnings.warn(f"the tokenizer does not know {unknown / words:.0%} of the text's words", stacklevel=2)


class Prepared:
    """What `prepare` wrote and what follows from it: all that a run of the recipe reads.

    baseline: what another process has found, once it had read and checked everything: that need not be done again.
    """

    def __init__(self, recipe: Recipe, folder: Path, baseline: Score | None = None) -> None:
        self.recipe, self.folder = recipe, folder
        self.config = HydraConfig.from_pretrained(folder)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder / "tokenizer")
        found = _open_rows(folder, check=baseline is None)
        self.train_rows, self.held_out_rows = found["train"], found["held_out"]
        rows = TrainingRows(self.train_rows, recipe.steps * recipe.batch_size, recipe.seed)
        self.training = rows, MaskedLMCollator(self.tokenizer, recipe.mask_rate)
        most = max(1, recipe.evaluation_tokens // recipe.length) if recipe.evaluation_tokens else None
        self.evaluation = EvaluationRows(self.held_out_rows, most), MaskedLMCollator(self.tokenizer, EVALUATION_RATE)
        self.baseline = baseline or unigram(self.train_rows.tokens, *self.evaluation)

    def model(self) -> HydraForMaskedLM:
        """With the weights that the run begins with: those of another, or new ones, by torch's seed."""
        if self.recipe.model is None:
            return HydraForMaskedLM(self.config)
        return HydraForMaskedLM.from_pretrained(self.folder, dtype=torch.float32)


def _config(recipe: Recipe, start: Start | None) -> HydraConfig:
    try:
        config = start.model.config if start else preset(recipe.preset or "")
    except ValueError as error:
        raise UserError(str(error)) from error
    if 0 < config.max_position_embeddings < recipe.length:
        whose = recipe.model or recipe.preset
        raise UserError(f"length must be at most {config.max_position_embeddings} for {whose}, got {recipe.length}")
    return config


def make_tokenizer(recipe: Recipe, corpus: Corpus) -> PreTrainedTokenizerBase:
    """The recipe's, or one that is trained on the text. Raises UserError where neither can be."""
    try:
        if recipe.tokenizer is not None:
            return load_tokenizer(recipe.tokenizer)
        return train_tokenizer(list(_sample(corpus)), recipe.vocab_size)
    except (OSError, ValueError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def _sample(corpus: Corpus) -> Iterator[str]:
    characters = 0
    for text in corpus.training_texts():
        yield text[: TOKENIZER_TEXT - characters]
        characters += len(text)
        if characters >= TOKENIZER_TEXT:
            return


def _check_enough(rows: PackedRows | ShardRows, recipe: Recipe, held_out: bool) -> None:
    """One batch to train on, one token to evaluate on."""
    tokens, batch = len(rows.tokens), recipe.batch_size * recipe.length
    if held_out and not tokens:
        raise UserError("the text must be long enough that a part can be held out: give more text, or --held-out")
    if not held_out and tokens < batch:
        raise UserError(
            f"the text must have at least {batch:,} tokens to train on (batch_size * length), it has {tokens:,}: give "
            "more text, or choose a smaller --batch-size or --length"
        )
