"""What is hidden, what is to be predicted, and where documents end."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_text import sentences

from hydra_ssm.text.collators import IGNORED, MaskedLMCollator, Row
from hydra_ssm.text.tokenizer import train_tokenizer
from hydra_ssm.train.baseline import token_counts, unigram
from hydra_ssm.train.packing import PackedRows
from hydra_ssm.train.rows import EvaluationRows, Shuffle, TrainingRows

TOKENIZER = train_tokenizer([sentences(100)], 90)
SPECIAL = torch.tensor(TOKENIZER.all_special_ids)


@st.composite
def some_rows(draw: st.DrawFn) -> list[Row]:
    """Rows of documents, special tokens among them, or no others, as of words that are all unknown."""
    lengths = draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4))
    random, most = np.random.default_rng(draw(st.integers(0, 1000))), draw(st.sampled_from([len(TOKENIZER), 5]))
    return [Row(random.integers(0, most, sum(row)), np.array(row), (7, i)) for i, row in enumerate(lengths)]


@given(some_rows(), st.floats(0.01, 1.0))
def test_only_ordinary_tokens_are_hidden_and_only_they_are_labelled(rows: list[Row], rate: float) -> None:
    batch = MaskedLMCollator(TOKENIZER, rate)(rows)
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows]))[None]
    hidden = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][hidden], tokens[hidden])
    assert torch.equal(batch["input_ids"][~hidden], tokens[~hidden])
    assert not torch.isin(tokens[hidden], SPECIAL).any()
    replaced = batch["input_ids"][hidden]
    assert not torch.isin(replaced[replaced != TOKENIZER.mask_token_id], SPECIAL).any()
    for row in rows:  # each has something to predict, if it can
        labels = MaskedLMCollator(TOKENIZER, rate).mask(row)[1]
        assert (labels != IGNORED).any() == (~np.isin(row.tokens, SPECIAL)).any()


@given(some_rows())
def test_cu_seqlens_are_the_ends_of_all_documents(rows: list[Row]) -> None:
    batch = MaskedLMCollator(TOKENIZER, 0.3)(rows)
    lengths = [length for row in rows for length in row.lengths]
    assert batch["cu_seqlens"].tolist() == [0, *np.cumsum(lengths)]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))


def test_the_share_of_hidden_tokens_and_what_they_become() -> None:
    n = 200_000
    tokens = np.random.default_rng(0).integers(5, len(TOKENIZER), n)
    inputs, labels = MaskedLMCollator(TOKENIZER, 0.3).mask(Row(tokens, np.array([n]), (0, 0)))
    hidden = labels != IGNORED
    assert hidden.mean() == pytest.approx(0.3, abs=0.005)
    masked, same = inputs[hidden] == TOKENIZER.mask_token_id, inputs[hidden] == tokens[hidden]
    by_chance = 0.1 / (len(TOKENIZER) - 5)
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert same.mean() == pytest.approx(0.1 + by_chance, abs=0.01)
    assert set(inputs[hidden]) == {TOKENIZER.mask_token_id, *range(5, len(TOKENIZER))}


@given(some_rows())
def test_the_masks_of_a_row_do_not_depend_on_its_batch(rows: list[Row]) -> None:
    collator = MaskedLMCollator(TOKENIZER, 0.3)
    together, alone = collator(rows), [collator([row]) for row in rows]
    for name in ("input_ids", "labels"):
        assert torch.equal(together[name], torch.cat([batch[name] for batch in alone], dim=1))


def test_masks_of_the_same_key_are_the_same_and_of_others_independent() -> None:
    n, rate = 20_000, 0.3
    tokens, collator = np.random.default_rng(0).integers(5, len(TOKENIZER), n), MaskedLMCollator(TOKENIZER, rate)
    found = {key: collator.mask(Row(tokens, np.array([n]), key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2,))}
    for key, (inputs, labels) in found.items():
        again = collator.mask(Row(tokens, np.array([n]), key))
        assert np.array_equal(again[0], inputs)
        assert np.array_equal(again[1], labels)
        for other in found.keys() - {key}:
            both = (labels != IGNORED) & (found[other][1] != IGNORED)
            assert both.mean() == pytest.approx(rate * rate, abs=0.01)


def test_a_run_sees_every_row_once_a_pass_in_a_new_order_with_new_masks(tmp_path) -> None:
    rows = PackedRows.write(tmp_path / "rows", [[2, 5 + i, 3] for i in range(40)], 3)
    order = TrainingRows(rows, 80, seed=1)
    passes = [[int(order[i].tokens[1]) for i in range(start, start + 40)] for start in (0, 40)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(5, 45))
    assert passes[0] != passes[1]
    assert len({order[i].key for i in range(80)}) == 80
    assert not {order[i].key for i in range(80)} & {TrainingRows(rows, 80, seed=2)[i].key for i in range(80)}
    again = TrainingRows(rows, 80, seed=1)
    assert [again[i].tokens[1] for i in (79, 3)] == [order[i].tokens[1] for i in (79, 3)]  # whatever was asked before


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 99_991])
def test_an_order_has_every_place_once(n: int) -> None:
    order = Shuffle(n, (1, 0))
    assert sorted(order[i] for i in range(n)) == list(range(n))


def test_an_order_knows_nothing_of_where_a_row_was() -> None:
    n = 10_000
    orders = [np.array([order[i] for i in range(n)]) for order in (Shuffle(n, (1, epoch)) for epoch in range(2))]
    places = np.arange(n)
    for one, other in ((places, orders[0]), (orders[0], orders[1]), (orders[0][1:], orders[0][:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / n**0.5
        assert abs(np.corrcoef(one % 100, other % 100)[0, 1]) < 4 / n**0.5
    assert (orders[0] == places).sum() < 8  # about one
    assert len({tuple(Shuffle(3, (seed, 0))[i] for i in range(3)) for seed in range(60)}) == 6


def test_an_order_of_all_of_c4_is_small() -> None:
    tracemalloc.start()
    assert 0 <= Shuffle(365_000_000, (0, 0))[364_999_999] < 365_000_000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_an_evaluation_reads_as_much_as_it_may_evenly_spread(tmp_path) -> None:
    rows = PackedRows.write(tmp_path / "rows", [[2, 5 + i, 3] for i in range(40)], 3)
    assert [row.key for row in map(EvaluationRows(rows).__getitem__, range(40))] == [(i,) for i in range(40)]
    for most, found in ((100, 40), (7, 7), (1, 1)):
        chosen = EvaluationRows(rows, most)
        places = [chosen[i].key[0] for i in range(len(chosen))]
        assert [int(chosen[i].tokens[1]) - 5 for i in range(len(chosen))] == places
        assert len(set(places)) == found
        assert all(abs(place - i * 40 / found) < 1 for i, place in enumerate(places))


def test_counting_tokens_holds_no_copy_of_them() -> None:
    tokens = np.repeat(np.arange(9, dtype=np.uint32), 1 << 19)
    tracemalloc.start()
    counts = token_counts(tokens, 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert counts.tolist() == [1 << 19] * 9 + [0] * 3
    assert peak < tokens.nbytes


def test_the_unigram_baseline_is_what_one_computes_by_hand(tmp_path) -> None:
    tokenizer = train_tokenizer(["aabb"], 9)  # the special tokens; a, b, ##a, ##b are 5 to 8
    train = np.array([2, 5, 5, 5, 6, 3])  # counts 3, 1, 0, 0; with one added 4, 2, 1, 1 of 8
    held_out = PackedRows.write(tmp_path / "rows", [[2, 5, 5, 6, 8, 3]], 8)
    score = unigram(train, EvaluationRows(held_out), MaskedLMCollator(tokenizer, 1.0))  # hides all
    by_hand = -(2 * np.log(4 / 8) + np.log(2 / 8) + np.log(1 / 8)) / 4
    assert score == (pytest.approx(by_hand), 2 / 4, 4)
