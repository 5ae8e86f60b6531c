"""The presets of BERT against transformers' BertForMaskedLM: a comparison's baseline must be the real one."""

import pytest
import torch
from small_models import tiny, words
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from hydra_ssm.text import HydraConfig, HydraForMaskedLM

HEAD = "cls.predictions"
NAMES = {  # ours, without its number and its last word: theirs
    "model.embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "model.embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "model.embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "model.embeddings.norm": "bert.embeddings.LayerNorm",
    "mixer.out_proj": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "feed_forward.0": "intermediate.dense",
    "feed_forward.2": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
    "head.dense": f"{HEAD}.transform.dense",
    "head.norm": f"{HEAD}.transform.LayerNorm",
    "decoder": f"{HEAD}.decoder",
}


def as_bert(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, under BertForMaskedLM's names."""
    found = {}
    for name, value in ours.items():
        path, _, last = name.rpartition(".")
        before = ""
        if path.startswith("model.encoder.layers."):
            number, path = path.removeprefix("model.encoder.layers.").split(".", 1)
            before = f"bert.encoder.layer.{number}."
        if path == "mixer.in_proj":
            parts = dict(zip(("value", "query", "key"), value.chunk(3), strict=True))
            found |= {f"{before}attention.self.{part}.{last}": own for part, own in parts.items()}
        else:
            found[f"{before}{NAMES[path]}.{last}"] = value
    if f"{HEAD}.decoder.bias" in found:  # one parameter with two names
        found[f"{HEAD}.bias"] = found[f"{HEAD}.decoder.bias"]
    return found


def bert(config: HydraConfig) -> BertForMaskedLM:
    """Of the same sizes; but for the dropout of attention weights, which ours has not, the same dropout."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.hidden_size // config.headdim, intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings, pad_token_id=config.pad_token_id,
            layer_norm_eps=config.layer_norm_eps, hidden_dropout_prob=config.hidden_dropout,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_bert_is_bert(training: bool) -> None:
    """Logits, loss and every gradient, with padding and two kinds of token; in training with the same dropout."""
    ours = HydraForMaskedLM(tiny("bert")).double().train(training)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no bias is zero, no norm is one
    theirs = bert(ours.config).double().train(training)
    assert theirs.load_state_dict(as_bert(ours.state_dict())) == ([], [])
    ids, kinds, mask = words(3, 12), torch.randint(2, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    if not training:  # dropout is drawn for padding, too
        mask[1, 7:] = 0
    labels = torch.where(torch.rand(3, 12) < 0.4, ids, -100).masked_fill(mask == 0, -100)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        output = model(input_ids=ids, attention_mask=mask, token_type_ids=kinds, labels=labels)
        output.loss.backward()
        found.append((output.logits, output.loss))
    (logits, loss), (wanted, exact) = found
    rows = labels != -100 if training else mask.bool()  # ours decodes in training what is to be predicted alone
    assert torch.allclose(logits if training else logits[rows], wanted[rows], rtol=0, atol=1e-12)
    assert torch.allclose(loss, exact, rtol=1e-12, atol=0)
    own = as_bert({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(own[name], parameter.grad, rtol=1e-9, atol=1e-13), name


def test_bert_begins_as_bert_does() -> None:
    """Every parameter has the spread that transformers gives it, and as many numbers."""
    torch.manual_seed(0)
    config = tiny("bert", vocab_size=1000, hidden_size=128, intermediate_size=512)
    own, theirs = as_bert(HydraForMaskedLM(config).state_dict()), bert(config).state_dict()
    assert own.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert own[name].shape == wanted.shape
        if wanted.std() == 0:
            assert torch.equal(own[name], wanted), name
            continue
        close = 5 / wanted.numel() ** 0.5  # five standard errors
        assert own[name].mean().abs() < close * wanted.std(), name
        assert (own[name].std() / wanted.std() - 1).abs() < close, name
    assert own["bert.embeddings.word_embeddings.weight"][0].abs().max() == 0  # of padding, in both
    assert theirs["bert.embeddings.word_embeddings.weight"][0].abs().max() == 0
