"""What a saved folder is used for: only the model that it holds, and all of a text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel

from hydra_ssm.text import HydraConfig, HydraForMaskedLM, HydraForSequenceClassification, HydraModel, inference
from hydra_ssm.text.inference import PAIRS, TextModel, nearest_pairs, packed_rows, paragraphs
from hydra_ssm.text.reading import read_text
from hydra_ssm.text.tokenizer import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "."]
TINY = HydraConfig(vocab_size=16, hidden_size=16, num_hidden_layers=2, headdim=8, d_state=4)


def save(model: PreTrainedModel, folder: Path, **changed: Any) -> Path:
    """The model and a tokenizer, with these changes to config.json."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    load_tokenizer(folder / "vocab.txt").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    return folder


def other_model(name: str) -> PreTrainedModel:
    sizes = {"vocab_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    if name == "bert":
        return BertForMaskedLM(BertConfig(**sizes, hidden_size=16, intermediate_size=16))
    return DistilBertForMaskedLM(DistilBertConfig(vocab_size=16, n_layers=1, n_heads=1, dim=16, hidden_dim=16))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a", "b", "", "c  d"], ["a b", "c d"]),
        (["", "a", "b", " \t", "", "c", ""], ["a b", "c"]),
        (["", "a", "b \u2028 c", "", ""], ["a", "b c"]),
    ],
)
def test_blank_lines_part_paragraphs_whatever_ends_a_line(
    lines: list[str], expected: list[str], end: str, tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(end.join(lines).encode())
    assert paragraphs(read_text(tmp_path / "text")) == expected


class Largest(TorchDispatchMode):
    """The most numbers that one tensor held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.numbers = max(self.numbers, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("size", [1, 7, PAIRS])
def test_the_most_alike_of_all_pairs_are_found_without_holding_all(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(40, 3, dtype=torch.float64)
    centred = vectors - vectors.mean(0)
    cosines = torch.cosine_similarity(centred[:, None], centred[None], dim=-1)
    expected = sorted(((cosines[i, j].item(), i, j) for i in range(40) for j in range(i + 1, 40)), reverse=True)
    monkeypatch.setattr(inference, "PAIRS", size * 40)
    found = nearest_pairs(vectors, 9)
    assert [(i, j) for i, j, _ in found] == [(i, j) for _, i, j in expected[:9]]
    assert [s for _, _, s in found] == pytest.approx([s for s, _, _ in expected[:9]])
    assert len(nearest_pairs(vectors[:3], 9)) == 3
    assert nearest_pairs(vectors[:1], 9) == []
    two = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    assert nearest_pairs(two, 9) == [(0, 1, pytest.approx(0.6))]


def test_comparing_many_texts_takes_little_memory() -> None:
    with Largest() as largest:
        nearest_pairs(torch.randn(5000, 2), 3)
    assert largest.numbers <= PAIRS < 5000 * 4999 / 2


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_another_kind_of_model_is_refused(name: str, tmp_path: Path) -> None:
    folder = save(other_model(name), tmp_path)
    with pytest.raises(ValueError, match=f"model_type of config.json must be hydra_ssm, got {name}"):
        TextModel(folder)


@pytest.mark.parametrize(
    "changed", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"vocab_size": 24}]
)
def test_weights_that_are_not_the_configurations_are_refused(changed: dict[str, int], tmp_path: Path) -> None:
    folder = save(HydraForMaskedLM(TINY), tmp_path, **changed)
    with pytest.raises(ValueError, match=r"its weights must be those of its config.json, (model|decoder|head)\."):
        TextModel(folder)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"norm": "mid"}, r"Field 'norm' expected one of \('post', 'pre'\), got mid"),
        ({"mixers": {"matrix": "low_rank", "rank": 3}}, "MatrixMixer has no option rank"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = save(HydraForMaskedLM(TINY), tmp_path, **changed)
    with pytest.raises(ValueError, match=f"holds no model that can be read: .*{reason}"):
        TextModel(folder)


TEXTS = ["the cat sat", "a", "", "the mat . " * 9, "on the mat the cat sat .", "sat", "the cat " * 40]
KINDS = {
    "hydra": {},
    "attention": {"mixers": "attention", "position_embeddings": True, "max_position_embeddings": 90},
    "fixed": {"mixers": {"matrix": "low_rank", "data_dependent": False}, "max_position_embeddings": 90},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40, 8192])
def test_texts_packed_in_rows_are_embedded_as_one_by_one(
    kind: str, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HydraModel(HydraConfig(**(TINY.to_diff_dict() | KINDS[kind]))).eval()
    found = TextModel(save(source, tmp_path))
    monkeypatch.setattr(inference, "TOKENS", tokens)
    ids = [found.tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    with torch.no_grad():
        expected = torch.cat([source.double()(i).last_hidden_state.mean(1) for i in ids])
    torch.testing.assert_close(found.embed(TEXTS).double(), expected, rtol=1e-5, atol=1e-5)


FIXED_TO_9 = {"mixers": {"matrix": "low_rank", "data_dependent": False, "max_length": 9}}


@pytest.mark.parametrize(
    ("sizes", "longest"),
    [
        ({}, None),
        ({"mixers": "toeplitz", "max_position_embeddings": 9}, None),  # which scales by it, at any length
        (FIXED_TO_9, 9),
        (FIXED_TO_9 | {"position_embeddings": True, "max_position_embeddings": 7}, 7),
    ],
)
def test_texts_are_cut_where_the_model_takes_no_longer_ones_and_no_mask_is_lost(
    sizes: dict[str, Any], longest: int | None, tmp_path: Path
) -> None:
    found = TextModel(save(HydraForMaskedLM(HydraConfig(**(TINY.to_diff_dict() | sizes))), tmp_path))
    words = ["the", "cat"] * 10
    whole, text = found.embed([" ".join(words)]), " ".join([*words[:8], "[MASK]", *words])
    assert torch.equal(whole, found.embed([" ".join(words[:10])])) == (longest is not None)
    if longest is None:
        assert len(found.fill(f"[MASK] {text}", top=1)) == 2
        return
    with pytest.raises(ValueError, match=rf"each \[MASK\] must be among the first {longest} tokens"):
        found.fill(f"[MASK] {text}", top=1)


def test_rows_hold_every_text_once_no_padding_and_no_more_than_they_may() -> None:
    lengths = [*torch.randint(1, 60, (500,)).tolist(), 300]
    rows = packed_rows(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(501))
    assert rows[0] == [500]  # longer than a row: alone
    sums = [sum(lengths[i] for i in row) for row in rows[1:]]
    assert max(sums) <= 256
    assert min(sums[:-1]) > 256 - 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_embeddings_by_its_rounding_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(HydraModel(TINY), tmp_path)
    exact, half = TextModel(folder), TextModel(folder, dtype)
    assert {p.dtype for n, p in half.model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D"))} == {
        torch.float32
    }
    assert half.model.model.embeddings.word_embeddings.weight.dtype == dtype
    vectors = half.embed(TEXTS)
    assert vectors.dtype == torch.float32
    # A handful of roundings of values of size one, as LayerNorm leaves them.
    torch.testing.assert_close(vectors, exact.embed(TEXTS), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("model", [HydraForSequenceClassification, HydraModel])
def test_a_model_without_a_head_for_words_embeds_and_fills_nothing(model: type[HydraModel], tmp_path: Path) -> None:
    source = model(TINY).eval()
    found = TextModel(save(source, tmp_path))
    ids = found.tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = getattr(source, "model", source)(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(found.embed(["the cat sat"]), expected)
    with pytest.raises(ValueError, match="must be a masked language model, it has no weights of a head"):
        found.fill("the [MASK] sat", 3)
