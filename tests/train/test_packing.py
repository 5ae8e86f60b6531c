"""Packing loses no token and doubles none."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_text import sentences

from hydra_ssm.text.tokenizer import SPECIAL, load_tokenizer, train_tokenizer
from hydra_ssm.train import packing
from hydra_ssm.train.packing import PackedRows, pack, pieces

TOKENIZER = train_tokenizer([sentences(100)], 90)
DOCUMENTS = st.lists(st.text("theca .\n", max_size=200), max_size=12)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_every_piece_is_in_one_row_that_has_room_for_it(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used, default=0) <= capacity
    assert sum(2 * u <= capacity for u in used) <= 1  # two half empty rows would be one


def test_a_piece_goes_where_the_least_room_is_left_the_longest_first() -> None:
    assert pack([3, 6, 7], 10) == [[2, 0], [1]]  # and not beside the 6
    assert pack([4, 5, 8, 2, 1], 10) == [[2, 3], [1, 0, 4]]
    assert pack([2, 2, 10, 2], 10) == [[2], [0, 1, 3]]  # of equal ones the first


@given(DOCUMENTS, st.integers(3, 30))
def test_the_pieces_of_a_document_are_its_tokens(documents: list[str], length: int) -> None:
    found = list(pieces(documents, TOKENIZER, length))
    assert all(3 <= len(piece) <= length for piece in found)
    assert all((piece[0], piece[-1]) == (TOKENIZER.cls_token_id, TOKENIZER.sep_token_id) for piece in found)
    tokens = [token for piece in found for token in piece[1:-1]]
    assert tokens == [token for text in documents for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    pieces_of_each = [
        -(-len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) // (length - 2)) for text in documents
    ]
    assert len(found) == sum(pieces_of_each)  # no piece holds two documents


def test_a_long_document_is_tokenized_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(pieces([sentences(50)], TOKENIZER, 16))
    monkeypatch.setattr(packing, "BLOCK", 100)
    assert list(pieces([sentences(50)], TOKENIZER, 16)) == whole


@given(DOCUMENTS, st.integers(3, 30), st.integers(1, 9))
def test_rows_on_disk_hold_the_pieces(documents: list[str], length: int, window: int) -> None:
    """However many pieces are packed together."""
    found = list(pieces(documents, TOKENIZER, length))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as change:
        change.setattr(packing, "WINDOW", window)
        rows = PackedRows.write(Path(folder) / "rows", found, length)
        kept = Counter()
        for i in range(len(rows)):
            tokens, lengths = rows[i]
            assert len(tokens) == lengths.sum() <= length
            kept.update(tuple(part.tolist()) for part in np.split(tokens, lengths.cumsum()[:-1]))
    assert kept == Counter(map(tuple, found))


def test_a_trained_tokenizer_is_the_same_every_time_and_after_loading(tmp_path: Path) -> None:
    again = train_tokenizer([sentences(100)], 90)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert len(again) <= 90
    assert [again.convert_tokens_to_ids(token) for token in SPECIAL.values()] == [0, 1, 2, 3, 4]
    TOKENIZER.save_pretrained(tmp_path / "folder")
    words = sorted(TOKENIZER.get_vocab(), key=TOKENIZER.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    text = "The Cat sees, a [MASK] dög!"
    for path in (tmp_path / "folder", tmp_path / "vocab.txt"):
        assert load_tokenizer(path)(text, "a dog")["input_ids"] == TOKENIZER(text, "a dog")["input_ids"]
    assert load_tokenizer(tmp_path / "folder")(text, "a dog")["token_type_ids"][-1] == 1
    assert TOKENIZER.mask_token_id in TOKENIZER(text)["input_ids"]
