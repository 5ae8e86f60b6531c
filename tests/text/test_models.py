"""The text models: exact with padding and packing, and what their heads learn."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import VOCABULARY, tiny, words
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hydra_ssm.text import (
    HydraForMaskedLM,
    HydraForMultipleChoice,
    HydraForQuestionAnswering,
    HydraForSequenceClassification,
    HydraForTokenClassification,
)

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
    loss = exact(ids, mask, labels=labels, cu_seqlens=offsets.int()).loss
    torch.testing.assert_close(loss, F.cross_entropy(packed[labels != -100], labels[labels != -100]))


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention on a CPU
@pytest.mark.parametrize("kind", ["hydra", "bert"])
def test_torch_func_gives_the_gradients_of_each_row_at_once(kind: str) -> None:
    model = HydraForMaskedLM(tiny(kind)).double().eval()
    ids, mask = words(2, 9), torch.arange(9) < torch.tensor([[9], [5]])
    labels = ids.where(mask, -100)

    def loss(parameters: dict[str, Tensor], ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "attention_mask": mask[None], "labels": labels[None]}
        found: Tensor = torch.func.functional_call(model, parameters, (), inputs).loss
        return found

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, ids, mask, labels)
    for i in range(2):
        own = loss(dict(model.named_parameters()), ids[i], mask[i], labels[i])
        expected = torch.autograd.grad(own, list(model.parameters()), materialize_grads=True)
        torch.testing.assert_close([found[name][i] for name in parameters], list(expected))


def test_documents_beyond_the_learned_positions_are_refused_and_long_rows_are_not() -> None:
    model = HydraForMaskedLM(tiny("bert"))
    model(words(1, 24), cu_seqlens=torch.tensor([0, 12, 24]))
    with pytest.raises(ValueError, match="max_position_embeddings = 12 tokens long, got 13"):
        model(words(1, 13))
    HydraForMaskedLM(tiny("hydra"))(words(1, 200))


@pytest.mark.parametrize(("first", "last"), [(0, 12), (-1, 3)])
def test_positions_that_were_not_learned_are_refused(first: int, last: int) -> None:
    places = torch.tensor([[first, 1, last]])
    with pytest.raises(ValueError, match=f"at least 0 and below max_position_embeddings = 12, got {first} to {last}"):
        HydraForMaskedLM(tiny("bert"))(words(1, 3), position_ids=places)


# ---------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ({"input_ids": words(3, 4)}, r"\(3, 4\)"),
        ({"inputs_embeds": torch.zeros(3, 4, 32)}, r"\(3, 4, 32\)"),
        ({"input_ids": words(3, 2, 4, 1)}, r"\(3, 2, 4, 1\)"),
        ({}, "none"),
    ],
)
def test_choices_of_another_shape_are_refused(inputs: dict[str, Tensor], got: str) -> None:
    with pytest.raises(ValueError, match=rf"input_ids must be \(batch, choices, length\), .* got {got}"):
        HydraForMultipleChoice(tiny())(**inputs)


def test_a_mask_of_choices_is_named_as_it_was_given() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be \(batch, length\) = \(6, 4\), got \(3, 4\)"):
        HydraForMultipleChoice(tiny())(input_ids=words(3, 2, 4), attention_mask=torch.ones(3, 4))


def test_in_training_a_masked_lm_decodes_labelled_tokens_alone(exact: HydraForMaskedLM) -> None:
    ids, labels = words(2, 9), torch.full((2, 9), -100)
    labels[0, 3], labels[1, 0], labels[1, 8] = 7, 8, 9
    full = exact(ids).logits
    decoded: list[tuple[int, ...]] = []
    exact.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(tuple(inputs[0].shape)))
    assert torch.equal(exact(ids, labels=labels).logits, full)
    for module in exact.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    output = exact(ids, labels=labels)
    assert decoded == [(2, 9, 32), (3, 32)]
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
    "masked words": (HydraForMaskedLM, {}, lambda: {"labels": words(3, 7)}, (3, 7, VOCABULARY)),
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
    # Where weights begin in memory decides on some processors how a product with one column is summed.
    torch.testing.assert_close(model(**batch)[1], loaded.eval()(**batch)[1])


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
