"""The text models are at home in transformers: configured, saved, loaded, compiled and used as its own."""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from small_models import VOCABULARY, tiny, words
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from hydra_ssm.encoder import EncoderLayer
from hydra_ssm.mixer import FLOAT32
from hydra_ssm.text import (
    PRESETS,
    HydraConfig,
    HydraForMaskedLM,
    HydraForQuestionAnswering,
    HydraForTokenClassification,
    HydraModel,
    HydraPreTrainedModel,
    preset,
)
from hydra_ssm.text.tokenizer import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", ".", "dog", "##s", "ran"]


def test_presets_have_their_sizes() -> None:
    millions = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = HydraForMaskedLM(preset(name))
        millions[name] = sum(p.numel() for p in model.parameters()) / 1e6
        assert HydraConfig.from_dict(preset(name).to_dict()).to_dict() == preset(name).to_dict()
    assert millions["hydra-base"] == pytest.approx(112, abs=0.5)
    assert millions["bert-base"] == pytest.approx(110, abs=1)
    assert millions["hydra-12"] == pytest.approx(70, abs=0.5)
    assert all(66 < size < 74 for name, size in millions.items() if "-12" in name)
    layers = {name: preset(name, vocab_size=8) for name in ("hydra-tiny", "bert-tiny")}
    sizes = {name: HydraForMaskedLM(config).num_parameters() for name, config in layers.items()}
    assert sizes["bert-tiny"] == pytest.approx(sizes["hydra-tiny"], rel=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset("hydra-huge"), "one of hydra-base, bert-base, .*got 'hydra-huge'"),
        (lambda: preset("hydra-tiny", d_sate=8), "no field d_sate"),
        (lambda: HydraConfig(mixers="mamba"), "a mixer must be one of hydra, attention.*'mamba'"),
        (lambda: HydraConfig(mixers={"matrix": "none"}), "matrix must be one of dense.*'none'"),
        (lambda: HydraConfig(mixers={}), "must name its matrix, got {}"),
        (lambda: HydraConfig(mixers={"matrix": "low_rank", "foo": 3}), "arguments of MatrixMixer, .* no option foo"),
        (lambda: HydraConfig(mixers=["hydra", "attention"], num_hidden_layers=3), "num_hidden_layers = 3, got 2"),
        (lambda: HydraConfig(headdim=100), "headdim must divide expand \\* d_model = 1536, got 100"),
        (lambda: HydraConfig(mixers="dense"), "fixed mixer needs max_position_embeddings"),
        (lambda: HydraConfig(position_embeddings=True), "position_embeddings needs max_position_embeddings"),
        (lambda: HydraConfig(hidden_size=0), "hidden_size must be at least 1, got 0"),
        (lambda: HydraConfig(num_hidden_layers=0), "num_hidden_layers must be at least 1, got 0"),
        (lambda: HydraConfig(embedding_dropout=1.0), "embedding_dropout must be .*below 1, got 1.0"),
        (lambda: HydraConfig(pad_token_id=40000), "pad_token_id must be below vocab_size = 30528, got 40000"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: Callable[[], HydraConfig], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("field", [{"norm": "mid"}, {"hidden_size": "64"}, {"mixers": ["hydra", 3]}])
def test_a_field_of_another_type_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Field '{next(iter(field))}'"):
        HydraConfig(**field)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": words(5)}, r"input_ids must be \(batch, length\).*\(5,\)"),
        ({"input_ids": words(2, 0)}, r"input_ids must be \(batch, length\), none of them 0, got \(2, 0\)"),
        (
            {"input_ids": words(2, 5), "attention_mask": torch.zeros(2, 4)},
            r"attention_mask must be .*\(2, 5\).*\(2, 4\)",
        ),
        (
            {"input_ids": words(2, 5), "attention_mask": torch.ones(2, 1, 1, 5)},
            r"attention_mask must be .*\(2, 5\).*\(2, 1, 1, 5\)",
        ),
        (
            {"input_ids": words(2, 5), "attention_mask": torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf]).expand(2, 5)},
            "attention_mask must be 1 for tokens and 0 for padding, got -inf",
        ),
        ({"inputs_embeds": torch.zeros(5, 32)}, r"inputs_embeds must be .*hidden_size = 32\).*\(5, 32\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 1)}, r"inputs_embeds must be .*hidden_size = 32\).*\(2, 5, 1\)"),
        ({"input_ids": words(2, 5), "labels": words(2, 4)}, r"labels must be .*\(2, 5\).*\(2, 4\)"),
        ({"input_ids": words(2, 5), "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs a batch of one packed row"),
        ({"input_ids": words(2, 5), "output_attentions": True}, "no attention maps"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraForMaskedLM(tiny())(**inputs)


def test_hidden_states_are_the_embeddings_and_each_layer(exact: HydraForMaskedLM) -> None:
    ids, mask = words(2, 6), torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 0]])
    output = exact.model(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == len(exact.model.encoder.layers) + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(exact.model(ids, mask, return_dict=False)[0], output.last_hidden_state)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # the new name is not in 5.17
def test_gradient_checkpointing_recomputes_layers_and_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HydraForMaskedLM(tiny("hybrid", embedding_dropout=0.0)).double()
    ids, labels, runs = words(2, 9), words(2, 9), []
    forward = EncoderLayer.forward
    monkeypatch.setattr(EncoderLayer, "forward", lambda self, *args: (runs.append(1), forward(self, *args))[1])
    gradients, contexts = [], []
    options = {"use_reentrant": False, "context_fn": lambda: (contexts.append(1) or nullcontext(), nullcontext())}
    for enable, calls in ((False, 4), (True, 8)):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        runs.clear()
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        assert len(runs) == calls
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-14)
    assert len(contexts) == 4
    model.gradient_checkpointing_disable()
    assert not model.model.encoder.gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_decays_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny("hybrid")
    HydraForMaskedLM(config).save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    loaded.save_pretrained(tmp_path / "half")
    for model in (
        loaded,
        AutoModelForMaskedLM.from_pretrained(tmp_path / "half"),
        AutoModelForMaskedLM.from_config(config, dtype=dtype),
        HydraForMaskedLM(config).to(dtype),
    ):
        kept = {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[2] in FLOAT32}
        rest = {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[2] not in FLOAT32}
        assert (kept, rest) == ({torch.float32}, {dtype})
        if dtype is torch.bfloat16:
            output = model(words(2, 7), labels=words(2, 7))
            output.loss.backward()
            assert output.loss.isfinite()


def test_what_a_checkpoint_lacks_is_drawn_as_in_a_new_model(tmp_path: Path) -> None:
    HydraForMaskedLM(tiny("hybrid")).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = ("dt_bias", "A_log", ".D", "fc_D.weight", "conv1d", "tables.q", "mixer.norm.weight", "in_proj")
    kept = {name: value for name, value in stored.items() if not any(part in name for part in lost)}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = HydraForMaskedLM.from_pretrained(tmp_path)
    for name, value in stored.items():
        found = model.get_parameter(name)
        if name in kept or name.endswith((".D", "A_log", "norm.weight", "in_proj.bias")):  # kept, or all 0 or 1
            assert torch.equal(found, value), name
        elif not name.endswith("dt_bias"):
            assert not torch.equal(found, value), name
            torch.testing.assert_close(found.std(), value.std(), rtol=0.3, atol=0, msg=name)
    steps = F.softplus(model.model.encoder.layers[0].mixer.dt_bias)
    assert ((steps > 0.9e-3) & (steps < 1.1e-1)).all()


@pytest.mark.parametrize("model_class", [HydraForMaskedLM, HydraForTokenClassification, HydraForQuestionAnswering])
def test_a_trainer_passes_on_what_packs_and_places_tokens(
    model_class: type[HydraPreTrainedModel], tmp_path: Path
) -> None:
    model = model_class(tiny("bert")).eval()
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, disable_tqdm=True),
        data_collator=lambda rows: {
            "cu_seqlens": torch.tensor(rows[0].pop("cu_seqlens")),
            **default_data_collator(rows),
        },
    )
    row = {"input_ids": words(24).tolist(), "cu_seqlens": [0, 12, 24], "position_ids": [*range(3, 9)] * 4, "other": 1}
    found = trainer.predict(Dataset.from_list([row])).predictions
    given = {name: torch.tensor(row[name])[None] for name in ("input_ids", "position_ids")}
    expected = model(**given, cu_seqlens=torch.tensor(row["cu_seqlens"]))[0]
    torch.testing.assert_close(torch.tensor(found[0] if isinstance(found, tuple) else found), expected.detach())


def test_a_trainer_gathers_a_prediction_for_each_token(tmp_path: Path) -> None:
    model, ids = HydraForMaskedLM(tiny()), words(7, 9)
    labels = torch.where(torch.rand(7, 9) < 0.3, ids, -100)
    seen: list[EvalPrediction] = []
    Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True),
        eval_dataset=[{"input_ids": i, "labels": w} for i, w in zip(ids, labels, strict=True)],
        compute_metrics=lambda found: seen.append(found) or {},
    ).evaluate()
    torch.testing.assert_close(torch.tensor(seen[0].predictions), model.eval()(ids).logits.detach())
    assert torch.equal(torch.tensor(seen[0].label_ids), labels)


def test_resized_embeddings_stay_tied_and_keep_old_words(tmp_path: Path) -> None:
    model = HydraForMaskedLM(tiny()).eval()
    ids = words(2, 6)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    assert model.config.vocab_size == model.decoder.out_features == VOCABULARY + 9
    torch.testing.assert_close(model(ids).logits[..., :VOCABULARY], before)
    assert model.decoder.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    ids[0, 0] = VOCABULARY + 8
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_untied_decoders_save_both_tables(tmp_path: Path) -> None:
    model = HydraForMaskedLM(tiny(tie_word_embeddings=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.decoder.weight is not loaded.get_input_embeddings().weight
    assert torch.equal(loaded.decoder.weight, model.decoder.weight)


def test_a_model_compiles_into_one_graph() -> None:
    exact = HydraForMaskedLM(tiny("hybrid", position_embeddings=True)).double().eval()
    compiled = torch.compile(exact, fullgraph=True, backend="eager")
    ids, mask = words(2, 9), torch.tensor([[0] + [1] * 8, [1] * 6 + [0] * 3])
    torch.testing.assert_close(compiled(ids).logits, exact(ids).logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(compiled(ids, mask).logits, exact(ids, mask).logits, rtol=0, atol=1e-12)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a model and its tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    load_tokenizer(tmp_path / "vocab.txt").save_pretrained(tmp_path / "model")
    HydraForMaskedLM(tiny(vocab_size=len(WORDS))).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pipelines_fill_masks_and_extract_features(saved: Path) -> None:
    fill = pipeline("fill-mask", model=str(saved))
    texts = ["the [MASK] sat on a mat .", "a dog [MASK]"]
    alone = [fill(text, top_k=3) for text in texts]
    together = fill(texts, top_k=3, batch_size=2)  # padded
    for a, b in zip(alone, together, strict=True):
        assert [guess["token_str"] for guess in a] == [guess["token_str"] for guess in b]
        assert a[0]["score"] == pytest.approx(b[0]["score"], rel=1e-5)
    features = pipeline("feature-extraction", model=str(saved))("the cats ran")
    assert torch.tensor(features).shape == (1, 6, 32)


def test_sentence_transformers_pool_a_saved_model(saved: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["the cat sat on a mat .", "a dog ran"]
    found = sentence_transformers.SentenceTransformer(str(saved), device="cpu").encode(texts)
    batch = load_tokenizer(saved)(texts, padding=True, return_tensors="pt")
    h = AutoModel.from_pretrained(saved)(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(torch.tensor(found), (h * mask).sum(1) / mask.sum(1))


def test_the_extra_is_named_where_transformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hydra_ssm.text")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers is not installed: pip install "hydra-ssm\[text\]"'):
        importlib.import_module("hydra_ssm.text")


def test_the_bare_model_is_what_automodel_gives(tmp_path: Path) -> None:
    model = HydraForMaskedLM(tiny()).eval()
    model.save_pretrained(tmp_path)
    bare, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(bare) is HydraModel
    assert not any(report.values())
    ids = words(1, 5)
    assert torch.equal(bare.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_layers_left_on_the_disk_are_fetched_for_their_turn(tmp_path: Path) -> None:
    model = HydraForMaskedLM(tiny("hybrid")).eval()
    model.save_pretrained(tmp_path)
    places = {name: "cpu" for name, _ in model.named_children()} | {"model.encoder": "disk"}
    places |= {"model.embeddings": places.pop("model")}
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "disk").eval()
    assert all(p.is_meta for p in loaded.model.encoder.parameters())
    ids, mask = words(2, 9), torch.tensor([[0] + [1] * 8, [1] * 6 + [0] * 3])
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
    ids = words(1, 9)
    assert torch.equal(*(m(ids, cu_seqlens=torch.tensor([0, 4, 9])).logits for m in (loaded, model)))
