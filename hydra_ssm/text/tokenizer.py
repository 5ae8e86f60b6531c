"""WordPiece tokenizers: trained on text as BERT's was, or loaded."""

from __future__ import annotations

import json
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of at most `vocab_size` tokens, the special ones first; the same every time.

    Raises ValueError where the vocabulary has no room for the special tokens and the characters of the text.
    """
    tokenizer = _wordpiece({})
    fixed = [*SPECIAL.values(), *_characters(texts)]
    if vocab_size < len(fixed):
        raise ValueError(f"vocab_size must be at least {len(fixed)} for the characters of this text, got {vocab_size}")
    # Declared as special, all single characters get their numbers from this list. The trainer would number them in the
    # order of a randomly seeded hash map, and break ties between merges by number.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(_wordpiece(tokenizer.get_vocab(with_added_tokens=False)))


def _characters(texts: Iterable[str]) -> list[str]:
    """What every word can be spelled with, sorted: characters, and those that occur inside words, marked."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pairs: set[tuple[str, str]] = set()
    for text in texts:
        plain = normalizer.normalize_str(f" {text}")
        pairs.update(pairwise(plain))
    first = {c for _, c in pairs if not c.isspace()}
    inner = {f"##{c}" for before, c in pairs if not (_ends_word(before) or _ends_word(c))}
    return sorted(first) + sorted(inner)


def _ends_word(character: str) -> bool:
    """Whether BERT's rule splits words around it."""
    return character.isspace() or character in string.punctuation or unicodedata.category(character).startswith("P")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder that `save_pretrained` wrote, or of a vocab.txt with one token a line.

    A vocabulary is for lower-case text as BERT's is, unless do_lower_case in a tokenizer_config.json beside it says
    otherwise, or, where there is none, a token has a capital letter.

    Raises FileNotFoundError where there is no tokenizer, ValueError where it is damaged or lacks one of the special
    tokens, or a vocabulary names a token twice.
    """
    path = Path(path)
    if path.is_dir() and not (path / "tokenizer.json").exists() and (path / "vocab.txt").exists():
        path = path / "vocab.txt"
    if path.is_dir():
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(f"a tokenizer's folder holds tokenizer.json or vocab.txt, {path} holds neither")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except Exception as error:  # of a damaged file, the tokenizers library raises Exception itself
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} holds no tokenizer that can be read: {reason}") from error
    elif path.is_file():
        tokenizer = _from_vocabulary(path)
    else:
        raise FileNotFoundError(f"no tokenizer at {path}: give a folder, or a vocab.txt with one token a line")
    missing = [name for name in SPECIAL if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(
            f"the tokenizer at {path} must have all of {', '.join(SPECIAL)}, it lacks {', '.join(missing)}"
        )
    return tokenizer


def _from_vocabulary(path: Path) -> PreTrainedTokenizerFast:
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")  # tokens hold other line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text with one token a line: {error}") from None
    tokens = [line.removesuffix("\r") for line in lines]
    twice = [token for token, times in Counter(tokens).items() if times > 1]
    if twice:
        raise ValueError(f"{path} must name each token once, it names {twice[0]!r} more than once")
    missing = set(SPECIAL.values()) - set(tokens)
    if missing:
        raise ValueError(f"{path} must hold {', '.join(SPECIAL.values())}, it lacks {', '.join(sorted(missing))}")
    plain = all(token == token.lower() for token in tokens if token not in SPECIAL.values())
    beside = path.with_name("tokenizer_config.json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return _fast(_wordpiece(vocabulary, config.get("do_lower_case", plain), config.get("strip_accents")))


def _wordpiece(vocabulary: dict[str, int], lowercase: bool = True, strip_accents: bool | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """As transformers uses it: [CLS] text [SEP], or [CLS] first [SEP] second [SEP] with token types 0 and 1."""
    cls, sep = SPECIAL["cls_token"], SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL,
    )
