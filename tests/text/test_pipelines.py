"""The pipelines of transformers run a saved folder, batches with padding as each text alone."""

from pathlib import Path

import pytest
import torch
from small_models import tiny
from test_inference import WORDS, save
from transformers import pipeline

from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.text.inference import TextModel

TEXTS = ["the [MASK] sat", "on a mat the cat sat . on [MASK] mat .", "[MASK]"]


@pytest.fixture(params=["hydra", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(HydraForMaskedLM(tiny(request.param, vocab_size=len(WORDS), max_position_embeddings=16)), tmp_path)


def test_fill_mask_finds_what_the_model_gives_each_text_alone(folder: Path) -> None:
    fill = pipeline("fill-mask", model=str(folder), device="cpu", top_k=4)
    found = fill(TEXTS, batch_size=3)
    model = TextModel(folder)
    for text, words in zip(TEXTS, found, strict=True):
        expected = model.fill(text, 4)[0]
        assert [word["token_str"] for word in words] == [word for word, _ in expected]
        assert [word["score"] for word in words] == pytest.approx([p for _, p in expected], rel=1e-4)


def test_feature_extraction_of_a_padded_batch_is_that_of_each_text(folder: Path) -> None:
    extract = pipeline("feature-extraction", model=str(folder), device="cpu", return_tensors=True)
    found = extract(TEXTS, batch_size=3)
    model = TextModel(folder)
    for text, features in zip(TEXTS, found, strict=True):
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model.model.double().model(ids).last_hidden_state
        torch.testing.assert_close(features[:, : ids.shape[1]].double(), expected, rtol=1e-5, atol=1e-5)
        assert not features[:, ids.shape[1] :].any()  # padding is zero
