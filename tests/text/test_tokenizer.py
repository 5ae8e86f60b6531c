"""A vocabulary means the same here as to those who made it."""

import json
from pathlib import Path

import pytest
from transformers import BertTokenizer

from hydra_ssm.text.tokenizer import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "é", "e", "."]


def write(folder: Path, tokens: list[str], end: str = "\n", **config: object) -> Path:
    path = folder / "vocab.txt"
    path.write_bytes("".join(token + end for token in tokens).encode())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_is_a_token_whatever_it_holds(end: str, tmp_path: Path) -> None:
    odd = ["\u2028", "\x85", "a\x0b", "\x0c", "\x1c", "last"]
    tokenizer = load_tokenizer(write(tmp_path, [*WORDS, *odd], end))
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [*WORDS, *odd]


def test_a_token_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab.txt must name each token once, it names 'cat' more than once"):
        load_tokenizer(write(tmp_path, [*WORDS, "cat"]))


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ([], {}),
        (["The"], {}),
        (["The"], {"do_lower_case": True}),
        ([], {"do_lower_case": False}),
        (["The"], {"do_lower_case": False, "strip_accents": True}),
        ([], {"do_lower_case": True, "strip_accents": False}),
    ],
)
def test_capitals_and_accents_are_kept_as_the_vocabulary_says(
    more: list[str], config: dict[str, bool], tmp_path: Path
) -> None:
    found = load_tokenizer(write(tmp_path, WORDS + more, **config))
    said = {"do_lower_case": not more} | config
    reference = BertTokenizer(vocab={token: i for i, token in enumerate(WORDS + more)}, **said)
    text = "The Cats. É é the"
    assert found(text)["input_ids"] == reference(text)["input_ids"]


@pytest.mark.parametrize("data", ["", "{", "{}", "[]", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_named(data: str, tmp_path: Path) -> None:
    load_tokenizer(write(tmp_path, WORDS)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(data, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer that can be read: "):
        load_tokenizer(tmp_path)
