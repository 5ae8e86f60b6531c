"""What a saved folder is used for: only the model that it holds, and all of a text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel

from hydra_ssm.text import HydraConfig, HydraForMaskedLM, HydraForSequenceClassification, HydraModel
from hydra_ssm.text.inference import TextModel
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


@pytest.mark.parametrize("model", [HydraForSequenceClassification, HydraModel])
def test_a_model_without_a_head_for_words_embeds_and_fills_nothing(model: type[HydraModel], tmp_path: Path) -> None:
    source = model(TINY).eval()
    found = TextModel(save(source, tmp_path))
    ids = found.tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = getattr(source, "model", source)(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(found.embed(["the cat sat"]), expected)
    with pytest.raises(ValueError, match="must be a masked language model, it has no weights of a head"):
        found.fill("the [MASK] sat", 3)
