"""The text models: exact with padding and packing, and at home in transformers."""

import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel, pipeline

from hydra_ssm.encoder import EncoderLayer
from hydra_ssm.mixer import FLOAT32
from hydra_ssm.text import (
    PRESETS,
    HydraConfig,
    HydraForMaskedLM,
    HydraForMultipleChoice,
    HydraForQuestionAnswering,
    HydraForSequenceClassification,
    HydraForTokenClassification,
    HydraModel,
    preset,
)
from hydra_ssm.text.tokenizer import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", ".", "dog", "##s", "ran"]
VOCABULARY = 40

KINDS: dict[str, dict[str, Any]] = {
    "hydra": {"num_hidden_layers": 2},
    "bert": {
        "mixers": "attention",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "position_embeddings": True,
        "max_position_embeddings": 12,
        "hidden_dropout": 0.1,
    },
    "hybrid": {
        "mixers": ["hydra", "attention", {"matrix": "low_rank", "data_dependent": False, "d_state": 4}, "toeplitz"],
        "max_position_embeddings": 12,
        "norm": "pre",
    },
}


def tiny(kind: str = "hydra", **changes: Any) -> HydraConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "headdim": 16, "d_state": 8}
    return HydraConfig(**(sizes | KINDS[kind] | changes))


def words(*shape: int) -> Tensor:
    return torch.randint(5, VOCABULARY, shape)


@pytest.fixture(params=KINDS)
def exact(request: pytest.FixtureRequest) -> HydraForMaskedLM:
    """A model of each kind in float64, without dropout."""
    return HydraForMaskedLM(tiny(request.param)).double().eval()


# ----------------------------------------------------------------------------------------------- padding and packing


def test_padding_at_any_place_changes_no_output_and_no_gradient(exact: HydraForMaskedLM) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 1, 1, 0], [1] * 8, [0] * 8])
    ids, labels = words(4, 8), words(4, 8)
    embedded = exact.get_input_embeddings()(ids).detach().masked_fill(mask[..., None] == 0, torch.nan)
    wanted = torch.where(mask == 1, labels, -100)
    exact(inputs_embeds=embedded, attention_mask=mask, labels=wanted, num_items_in_batch=1).loss.backward()
    padded = {name: p.grad for name, p in exact.named_parameters()}
    exact.zero_grad()
    for row, kept in enumerate(mask.bool()[:3]):
        alone = exact(ids[row, kept][None])
        for kind in (torch.bool, torch.float32, torch.int64):
            logits = exact(ids, mask.to(kind)).logits[row, kept]
            torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-12)
        vectors = exact.get_input_embeddings()(ids[row, kept][None]).detach()
        exact(inputs_embeds=vectors, labels=labels[row, kept][None], num_items_in_batch=1).loss.backward()
    for name, parameter in exact.named_parameters():
        if name != "model.embeddings.word_embeddings.weight":  # the decoder's gradient is there, the inputs' is not
            torch.testing.assert_close(padded[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)
    assert exact.model(ids, mask).last_hidden_state[mask == 0].eq(0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_come_out_as_if_alone(exact: HydraForMaskedLM, padded: bool) -> None:
    lengths = torch.tensor([3, 1, 7, 5])
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    ids, mask = words(1, 16), torch.ones(1, 16, dtype=torch.long)
    if padded:
        mask[0, [0, 2, 8, 15]] = 0
    labels = torch.where(mask == 1, words(1, 16), -100)
    packed = exact(ids, mask, cu_seqlens=offsets).logits
    for start, end in pairwise(offsets):
        kept = mask[0, start:end].bool()
        alone = exact(ids[:, start:end][:, kept]).logits
        torch.testing.assert_close(packed[0, start:end][kept], alone[0], rtol=0, atol=1e-12)
    chosen = exact(ids, mask, labels=labels, cu_seqlens=offsets.int()).logits
    torch.testing.assert_close(chosen, packed[labels != -100], rtol=0, atol=1e-12)


def test_a_classifier_reads_the_first_token_of_each_document(exact: HydraForMaskedLM) -> None:
    model = HydraForSequenceClassification(exact.config).double().eval()
    first, second = words(1, 3), words(1, 5)
    alone = torch.cat([model(first).logits, model(second).logits])
    packed = model(torch.cat([first, second], 1), cu_seqlens=torch.tensor([0, 3, 8])).logits
    padded = torch.cat([F.pad(first, (2, 0)), second])  # the padding is at the left
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(padded, mask).logits, alone, rtol=0, atol=1e-12)


def test_a_document_without_tokens_is_classified_from_zeros() -> None:
    model = HydraForSequenceClassification(tiny()).eval()
    logits = model(words(1, 4), cu_seqlens=torch.tensor([0, 0, 4, 4])).logits
    empty = model.classifier(model.pooler.bias.tanh())
    torch.testing.assert_close(logits[[0, 2]], empty.expand(2, -1))
    torch.testing.assert_close(model(words(1, 4), torch.zeros(1, 4)).logits, empty[None])


def test_documents_beyond_the_learned_positions_are_refused_and_long_rows_are_not() -> None:
    model = HydraForMaskedLM(tiny("bert"))
    model(words(1, 24), cu_seqlens=torch.tensor([0, 12, 24]))
    with pytest.raises(ValueError, match="max_position_embeddings = 12 tokens long, got 13"):
        model(words(1, 13))
    HydraForMaskedLM(tiny("hydra"))(words(1, 200))


# ---------------------------------------------------------------------------------------------------------------- heads


def test_a_masked_lm_decodes_labelled_tokens_alone(exact: HydraForMaskedLM) -> None:
    ids, labels = words(2, 9), torch.full((2, 9), -100)
    labels[0, 3], labels[1, 0], labels[1, 8] = 7, 8, 9
    full = exact(ids).logits
    decoded: list[tuple[int, ...]] = []
    exact.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(tuple(inputs[0].shape)))
    output = exact(ids, labels=labels)
    assert decoded == [(3, 32)]
    torch.testing.assert_close(output.logits, full[labels != -100], rtol=0, atol=1e-12)
    loss = F.cross_entropy(full.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, loss)
    accumulated = exact(ids, labels=labels, num_items_in_batch=torch.tensor(6)).loss
    torch.testing.assert_close(accumulated, loss / 2)


def test_a_batch_with_nothing_to_predict_has_no_loss_and_no_nan() -> None:
    model = HydraForMaskedLM(tiny())
    for count in (None, 0, torch.tensor(0)):
        output = model(words(2, 5), labels=torch.full((2, 5), -100), num_items_in_batch=count)
        output.loss.backward()
        assert output.loss == 0
    assert output.logits.shape == (0, VOCABULARY)
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


TASKS: dict[str, tuple[type[PreTrainedModel], dict[str, Any], Callable[[], dict[str, Tensor]], tuple[int, ...]]] = {
    "masked words": (HydraForMaskedLM, {}, lambda: {"labels": words(3, 7)}, (21, VOCABULARY)),
    "one class": (
        HydraForSequenceClassification,
        {"num_labels": 3},
        lambda: {"labels": torch.tensor([0, 2, 1])},
        (3, 3),
    ),
    "several classes": (
        HydraForSequenceClassification,
        {"num_labels": 2},
        lambda: {"labels": torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])},
        (3, 2),
    ),
    "a number": (
        HydraForSequenceClassification,
        {"num_labels": 1},
        lambda: {"labels": torch.tensor([0.5, 3.0, -1.0])},
        (3, 1),
    ),
    "token classes": (HydraForTokenClassification, {"num_labels": 5}, lambda: {"labels": words(3, 7) % 5}, (3, 7, 5)),
    "answers": (
        HydraForQuestionAnswering,
        {},
        lambda: {"start_positions": torch.tensor([0, 1, 9]), "end_positions": torch.tensor([2, 1, 9])},
        (3, 7),
    ),
    "choices": (
        HydraForMultipleChoice,
        {},
        lambda: {"input_ids": words(3, 4, 7), "labels": torch.tensor([3, 0, 1])},
        (3, 4),
    ),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["hydra", "bert"])
def test_every_head_learns_saves_and_loads_by_its_auto_class(task: str, kind: str, tmp_path: Path) -> None:
    model_class, changes, targets, shape = TASKS[task]
    model = model_class(tiny(kind, **changes)).eval()
    batch = {"input_ids": words(3, 7), **targets()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    logits = output.start_logits if task == "answers" else output.logits
    assert logits.shape == shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    model.save_pretrained(tmp_path)
    auto = getattr(transformers, model_class.__name__.replace("Hydra", "AutoModel"))
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class
    assert not any(report.values())
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model(**batch)[1], loaded.eval()(**batch)[1])


def test_a_classifier_starts_from_a_masked_lm_or_from_another_classifier(tmp_path: Path) -> None:
    HydraForMaskedLM(tiny()).save_pretrained(tmp_path / "lm")
    three = HydraForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=3)
    three.save_pretrained(tmp_path / "three")
    two, report = HydraForSequenceClassification.from_pretrained(
        tmp_path / "three", num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in report["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert torch.equal(two.pooler.weight, three.pooler.weight)
    assert two.classifier.weight.std() < 0.1


# ------------------------------------------------------------------------------------------------------- transformers


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
    gradients = []
    for enable, calls in ((False, 4), (True, 8)):
        if enable:
            model.gradient_checkpointing_enable()
        runs.clear()
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        assert len(runs) == calls
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-14)
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
