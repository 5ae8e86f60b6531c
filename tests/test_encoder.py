"""The residual stack: norms, feed-forward layers, hybrids, checkpointing."""

import pytest
import torch

from hydra_ssm import Encoder, EncoderLayer, MatrixMixer, SelfAttention
from hydra_ssm.ops import Order, layout

SMALL = {"d_state": 4, "headdim": 8}
HYBRID = ["hydra", "attention", "low_rank", {"matrix": "attention", "d_conv": 3}, {"matrix": "dft", "max_length": 50}]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("d_ff", [0, 24])
def test_one_encoder_holds_any_mixers(norm, d_ff):
    encoder = Encoder(16, HYBRID, norm=norm, d_ff=d_ff, **SMALL)
    y = encoder(torch.randn(2, 11, 16))
    y.sum().backward()
    assert y.shape == (2, 11, 16)
    assert all(p.grad is not None for n, p in encoder.named_parameters())
    assert isinstance(encoder.layers[1].mixer, SelfAttention)
    assert type(encoder.layers[3].mixer) is MatrixMixer


def test_post_norm_and_pre_norm_are_where_they_should_be():
    h = torch.randn(1, 5, 16)
    post, pre = (Encoder(16, ["hydra"], norm=norm, **SMALL) for norm in ("post", "pre"))
    layer = post.layers[0]
    torch.testing.assert_close(post(h), layer.norm(h + layer.mixer(h)))
    layer = pre.layers[0]
    torch.testing.assert_close(pre(h), pre.last_norm(h + layer.mixer(layer.norm(h))))


def test_every_layer_is_returned_on_request():
    encoder = Encoder(16, ["hydra", "attention"], **SMALL)
    h, mask = torch.randn(2, 9, 16), torch.rand(2, 9) > 0.3
    states = encoder(h, mask, every_layer=True)
    assert states.shape == (2, 9, 3, 16)
    torch.testing.assert_close(states[:, :, -1], encoder(h, mask))
    torch.testing.assert_close(states[:, :, 0][mask], h[mask])


def test_checkpointing_changes_memory_and_no_gradient():
    encoder = Encoder(16, ["hydra", "attention"], d_ff=24, dropout=0.1, **SMALL)
    h, mask, found = torch.randn(2, 9, 16), torch.rand(2, 9) > 0.3, {}
    for on in (False, True):
        encoder.gradient_checkpointing = on
        encoder.zero_grad()
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            loss = encoder(h, mask).square().sum()
        loss.backward()
        found[on] = sum(saved), [p.grad.clone() for p in encoder.parameters()]
    torch.testing.assert_close(found[True][1], found[False][1])
    assert found[True][0] < found[False][0] / 3


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"a mixer must be one of hydra, attention, dense, .*got 'mamba'"):
        Encoder(16, ["mamba"])
    with pytest.raises(TypeError, match=r"mixers must be a list .*got 'hydra': \['hydra'\] is one layer"):
        Encoder(16, "hydra")
    with pytest.raises(ValueError, match="at least one mixer"):
        Encoder(16, [])
    with pytest.raises(ValueError, match="norm must be 'post' or 'pre', got 'sandwich'"):
        Encoder(16, ["hydra"], norm="sandwich", **SMALL)
    with pytest.raises(TypeError, match=r"a mixer must be one of .*, or a mapping of MatrixMixer's arguments, got 3"):
        Encoder(16, [3])
    for name in ("d_ff", "d_condition"):
        with pytest.raises(ValueError, match=f"{name} must be a width, or 0 for none, got -1"):
            Encoder(16, ["hydra"], **{name: -1}, **SMALL)
    with pytest.raises(ValueError, match=r"states must come without every_layer, which gives all of them, got \[1\]"):
        Encoder(16, ["hydra"], **SMALL)(torch.zeros(2, 5, 16), every_layer=True, states=[1])
    with pytest.raises(ValueError, match="headdim must divide expand \\* d_model = 32, got 9"):
        Encoder(16, ["hydra"], headdim=9)
    with pytest.raises(ValueError, match=r"\(batch, length, d_model = 16\), none of them 0, got \(2, 0, 16\)"):
        Encoder(16, ["hydra"], **SMALL)(torch.zeros(2, 0, 16))
    with pytest.raises(ValueError, match=r"d_model = 16\), none of them 0, got \(2, 5, 8\)"):
        Encoder(16, ["hydra"], **SMALL)(torch.zeros(2, 5, 8))
    with pytest.raises(TypeError, match="an encoder has no option d_stat"):
        Encoder(16, ["attention"], d_stat=3)


def test_a_layer_refuses_a_mask_that_it_would_not_heed():
    layer, h = EncoderLayer(MatrixMixer(16, "add", **SMALL)), torch.zeros(1, 5, 16)
    one = layout((1, 5), None, torch.tensor([0, 2, 5])).documents
    with pytest.raises(ValueError, match="mask must come with an order"):
        layer(h, mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="documents must come without an order"):
        layer(h, one, order=Order.of(torch.arange(5)))


@pytest.mark.parametrize("order", [torch.arange(5), torch.arange(5).expand(2, 1, 5)])
def test_a_mask_of_numbers_is_refused_by_name_along_any_order(order):
    with pytest.raises(TypeError, match=r"mask must be bool, .* pass mask.bool\(\)"):
        Encoder(16, ["add"], **SMALL)(torch.zeros(1, 5, 16), torch.ones(1, 5), order=order)


def test_dropout_and_eps_reach_every_layer():
    h = torch.randn(1, 9, 16)
    encoder = Encoder(16, ["hydra", "attention"], d_ff=24, dropout=0.5, eps=1e6, **SMALL)
    assert not torch.equal(encoder(h), encoder(h))
    assert torch.equal(encoder.eval()(h), encoder(h))
    assert encoder(h).abs().max() < 1e-2
    assert {m.p for m in encoder.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


def test_what_hooks_or_wraps_a_mixer_sees_each_batch():
    encoder = Encoder(16, ["hydra", "attention"], **SMALL)
    h, mask, offsets = torch.randn(1, 9, 16), torch.rand(1, 9) > 0.3, torch.tensor([0, 4, 9])
    plain, seen = encoder(h, mask, offsets), []
    for layer in encoder.layers:
        layer.mixer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(encoder(h, mask, offsets), plain)
    assert len(seen) == 2
    encoder.layers[0].mixer = torch.compile(encoder.layers[0].mixer, backend="eager")
    torch.testing.assert_close(encoder(h, mask, offsets), plain)
    encoder(h)
    assert len(seen) > 4


def test_documents_are_told_once():
    mixer = Encoder(16, ["hydra"], **SMALL).layers[0].mixer
    h, mask = torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[7], [9]])
    documents = layout((2, 9), mask, None).documents
    torch.testing.assert_close(mixer(h, documents=documents)[mask], mixer(h, mask)[mask])
    with pytest.raises(ValueError, match="documents must come without mask and cu_seqlens"):
        mixer(h, mask, documents=documents)
