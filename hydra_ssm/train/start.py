"""The model that a run begins with: weights, sizes and tokenizer of a folder, or of a name on the Hugging Face Hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from ..text import HydraConfig, HydraForMaskedLM, preset
from ..text.config import PRESETS, differences
from ..text.inference import load_config, load_model
from ..text.messages import quiet
from ..text.tokenizer import load_tokenizer
from .errors import UserError

PADDING = 128  # more vectors than words: a vocabulary is padded to a multiple of 8 here, elsewhere of up to this
FILES = ["*.json", "*.safetensors", "vocab.txt"]


def preset_of(model: str) -> str | None:
    """The preset that has the model's sizes, if one has. Raises UserError where there is no model that can be read."""
    config = _config(_folder(model))
    return next((name for name in PRESETS if not differences(config, preset(name))), None)


class Start:
    """A masked language model in float32 and, where the folder has one, its tokenizer.

    A head that the folder lacks, as a classifier's does, is drawn by the seed.

    Raises UserError where there is no such model, its weights are rounded, or it is not of the preset.
    """

    def __init__(self, model: str, preset_name: str | None, seed: int) -> None:
        self.name, self.folder = model, _folder(model)
        _check_preset(_config(self.folder), preset_name, model)
        set_seed(seed)
        with _users():
            found, lacks_head = load_model(self.folder, HydraForMaskedLM, dtype=torch.float32)
            assert isinstance(found, HydraForMaskedLM)
            self.model = found
            has_words = any((self.folder / name).exists() for name in ("tokenizer.json", "vocab.txt"))
            self.words: PreTrainedTokenizerBase | None = load_tokenizer(self.folder) if has_words else None
        if lacks_head:
            warnings.warn(f"{model} has no head that predicts words: it gets a new one", stacklevel=2)

    def tokenizer(self, given: PreTrainedTokenizerBase | None, whose: str, instead: str) -> PreTrainedTokenizerBase:
        """The model's own, or the one that is given where that has the same words.

        Args:
            whose: what has the given one.
            instead: what to do where it has other words.

        Raises UserError where it has, or there is none.
        """
        found = given or self.words
        if found is None:
            raise UserError(f"{self.name} must hold the model's tokenizer, it holds none: give that with --tokenizer")
        most = self.model.config.vocab_size
        if self.words is None:
            if not most - PADDING < len(found) <= most:
                raise UserError(
                    f"{whose} must have the words of the model in {self.name}, about {most:,}, it has {len(found):,}: "
                    "give the one that the model was trained with"
                )
        elif found.get_vocab() != self.words.get_vocab():
            raise UserError(f"{whose} must have the words of the tokenizer in {self.name}, it has others: {instead}")
        elif len(found) > most:
            raise UserError(f"the tokenizer in {self.name} must have {most:,} words at most, it has {len(found):,}")
        return found


def _folder(model: str) -> Path:
    """The folder itself, or where a model of the Hub was brought to."""
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"there is no folder {model} with a model")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(str(snapshot_download(model, allow_patterns=FILES)))
    except Exception as error:  # network, name, permission: each has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{model} is neither a folder nor a model on the Hub that could be loaded: {reason}") from error


def _config(folder: Path) -> HydraConfig:
    with _users():
        config = load_config(folder)
    if getattr(config, "quantization_config", None):
        raise UserError(f"{folder} must hold weights to train, its are rounded: give the folder that they come from")
    return config


@contextmanager
def _users() -> Iterator[None]:
    """What is wrong with a folder is for the user to repair."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _check_preset(config: HydraConfig, name: str | None, model: str) -> None:
    if name is None:
        return
    try:
        wanted = preset(name)
    except ValueError as error:
        raise UserError(str(error)) from error
    if others := differences(config, wanted):
        own, other = (getattr(one, others[0]) for one in (config, wanted))
        raise UserError(
            f"the model in {model} must have the sizes of the preset {name}, its {others[0]} is {own} in place of "
            f"{other}: leave out --preset, or --model"
        )
