"""Padding and packing are exact: real tokens come out, and get gradients, as if each document were run alone."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_ssm import MATRICES, Encoder, MatrixMixer
from hydra_ssm.inspection import mixing_matrices
from hydra_ssm.ops import gated_rms_norm, layout, rows, short_conv

FORMS = [(name, dd) for name, c in MATRICES.items() for dd in (True, False) if (c.data_dependent if dd else c.fixed)]
forms = pytest.mark.parametrize(("name", "data_dependent"), FORMS)
NAN = float("nan")
PACKED = torch.tensor([0, 1, 9, 26, 40])


def mixer(name, data_dependent=None, **options):
    """A small block with no parameter at a special value."""
    m = MatrixMixer(
        16, name, data_dependent=data_dependent, d_state=4, headdim=8, max_length=40, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return m


def run(m, u, grad, **where):
    """Output, gradient of the input, gradients of the parameters."""
    u = u.clone().requires_grad_()
    m.zero_grad()
    y = m(u, **where)
    y.backward(grad)
    return y.detach(), u.grad, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in m.parameters()]


def check_alone(m, u, grad, pieces, **where):
    """The batch equals its pieces run alone, each a (row, token indices); returns the batch's output."""
    y, du, dp = run(m, u, grad, **where)
    total = [torch.zeros_like(p) for p in dp]
    for row, tokens in pieces:
        alone = run(m, u[row, tokens][None], grad[row, tokens][None])
        torch.testing.assert_close(y[row, tokens], alone[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(du[row, tokens], alone[1][0], rtol=0, atol=1e-12)
        total = [a + b for a, b in zip(total, alone[2], strict=True)]
    torch.testing.assert_close(dp, total, rtol=1e-12, atol=1e-12)
    return y, du


@forms
def test_padding_at_any_place_does_not_leak_even_if_it_is_nan(name, data_dependent):
    mask = torch.rand(4, 40) > 0.4
    mask[1] = True
    mask[2] = False
    mask[2, 17] = True  # a row of one token
    mask[3] = torch.arange(40) >= 9  # padding on the left
    u = torch.randn(4, 40, 16, dtype=torch.float64).masked_fill(~mask[..., None], NAN)
    pieces = [(b, mask[b].nonzero()[:, 0]) for b in range(4)]
    y, du = check_alone(mixer(name, data_dependent), u, torch.randn(4, 40, 16, dtype=torch.float64), pieces, mask=mask)
    assert y[~mask].abs().max() == 0
    assert du[~mask].abs().max() == 0


@forms
def test_packed_documents_do_not_see_each_other(name, data_dependent):
    u, grad = torch.randn(2, 1, 40, 16, dtype=torch.float64)
    pieces = [(0, torch.arange(s, e)) for s, e in PACKED.unfold(0, 2, 1)]
    check_alone(mixer(name, data_dependent), u, grad, pieces, cu_seqlens=PACKED)


@forms
def test_packing_and_padding_go_together(name, data_dependent):
    mask = torch.rand(1, 40) > 0.3
    mask[0, 1:9] = False  # a document that is all padding
    u = torch.randn(1, 40, 16, dtype=torch.float64).masked_fill(~mask[..., None], NAN)
    pieces = [(0, s + mask[0, s:e].nonzero()[:, 0]) for s, e in PACKED.unfold(0, 2, 1)]
    pieces = [(row, tokens) for row, tokens in pieces if len(tokens)]
    grad = torch.randn(1, 40, 16, dtype=torch.float64)
    check_alone(mixer(name, data_dependent), u, grad, pieces, mask=mask, cu_seqlens=PACKED)


@pytest.mark.parametrize("name", ["quasiseparable", "concat"])
def test_initial_states_enter_every_document(name):
    u, grad = torch.randn(2, 1, 40, 16, dtype=torch.float64)
    pieces = [(0, torch.arange(s, e)) for s, e in PACKED.unfold(0, 2, 1)]
    check_alone(mixer(name, learnable_init_states=True), u, grad, pieces, cu_seqlens=PACKED)


@pytest.mark.parametrize("name", ["attention", "low_rank", "quasiseparable"])
def test_bare_mixers_are_exact_too(name):
    u, grad = torch.randn(2, 1, 40, 16, dtype=torch.float64)
    pieces = [(0, torch.arange(s, e)) for s, e in PACKED.unfold(0, 2, 1)]
    check_alone(mixer(name, bare=True, bias=True), u, grad, pieces, cu_seqlens=PACKED)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), d_conv=st.sampled_from([1, 3, 7, 9]),
    name=st.sampled_from(["quasiseparable", "toeplitz"]),
)  # fmt: skip
def test_any_packing_equals_its_documents(lengths, d_conv, name):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    u = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    m = mixer(name, d_conv=d_conv)
    alone = torch.cat([m(part) for part in u.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(m(u, cu_seqlens=cu_seqlens), alone, rtol=0, atol=1e-12)


@forms
def test_the_matrix_of_a_packed_or_padded_batch_is_block_diagonal_and_multiplies(name, data_dependent):
    if name == "mult":
        return
    m, u = mixer(name, data_dependent), torch.randn(1, 40, 16, dtype=torch.float64)
    mask = torch.rand(1, 40) > 0.2
    matrix = m.matrix(u, mask, PACKED)
    M, x = matrix.dense(), torch.randn(1, 40, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(matrix @ x, torch.einsum("bhij,bjhp->bihp", M, x), rtol=0, atol=1e-12)
    number = torch.bucketize(torch.arange(40), PACKED[1:], right=True)
    apart = (number[:, None] != number) | ~mask[0, :, None] | ~mask[0]
    assert M[0, :, apart].abs().max() == 0
    assert M[0, :, ~apart].abs().max() > 0


@pytest.mark.parametrize("bad", [NAN, float("inf")])
@forms
def test_nan_is_passed_on_and_stays_in_its_document(name, data_dependent, bad):
    m, u = mixer(name, data_dependent), torch.randn(1, 40, 16, dtype=torch.float64)
    clean = m(u, cu_seqlens=PACKED)
    u[0, 12, 3] = bad
    y = m(u, cu_seqlens=PACKED)
    assert y[0, 9:26].isnan().any()
    others = [*range(9), *range(26, 40)]
    torch.testing.assert_close(y[0, others], clean[0, others], rtol=0, atol=1e-12)
    rows = torch.cat([u, torch.randn(1, 40, 16, dtype=torch.float64)])
    assert m(rows)[0].isnan().any()
    assert m(rows)[1].isfinite().all()


@pytest.mark.parametrize("name", ["attention", "low_rank", "toeplitz", "dft"])
def test_uneven_documents_cost_no_more_than_twice_their_tokens(name):
    """Documents of like lengths go together: one long one does not make rows of its length for the short ones."""
    lengths = [32] + [1] * 200
    place = rows(layout((1, sum(lengths)), None, torch.tensor([0, *lengths]).cumsum(0)).documents)
    assert sum(one.source.numel() for one in place) <= 2 * sum(lengths)
    u, m = torch.randn(1, sum(lengths), 16, dtype=torch.float64), mixer(name)
    alone = torch.cat([m(part) for part in u.split(lengths, dim=1)], dim=1)
    y = m(u, cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))
    torch.testing.assert_close(y, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, c in MATRICES.items() if c.fixed])
def test_a_fixed_mixer_counts_tokens_not_padding(name):
    m, mask = mixer(name, False), torch.rand(2, 70) > 0.65
    u = torch.randn(2, 70, 16, dtype=torch.float64).masked_fill(~mask[..., None], NAN)
    check_alone(
        m, u, torch.randn(2, 70, 16, dtype=torch.float64), [(b, mask[b].nonzero()[:, 0]) for b in (0, 1)], mask=mask
    )
    with pytest.raises(ValueError, match="lengths up to max_length = 40, got 65"):
        m(torch.zeros(1, 70, 16, dtype=torch.float64), torch.arange(70)[None] < 65)


@forms
def test_a_row_without_a_token_gives_zero_and_finite_gradients(name, data_dependent):
    m = mixer(name, data_dependent)
    mask = torch.tensor([[True] * 5, [False] * 5])
    y, du, dp = run(
        m, torch.full((2, 5, 16), 1.0).double().masked_fill(~mask[..., None], NAN), torch.ones(2, 5, 16), mask=mask
    )
    assert y[1].abs().max() == 0
    assert all(t.isfinite().all() for t in (y, du, *dp))


@forms
@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_without_a_token_gives_zero_and_no_gradient(name, data_dependent, packed):
    """Also one longer than what a fixed mixer takes."""
    m, u, mask = mixer(name, data_dependent), torch.full((1, 50, 16), NAN).double(), torch.zeros(1, 50).bool()
    where = {"mask": mask, "cu_seqlens": torch.tensor([0, 20, 50]) if packed else None}
    y, du, dp = run(m, u, torch.ones_like(u), **where)
    assert all(t.isfinite().all() and not t.any() for t in (y, du, *dp))
    if name != "mult":
        assert not m.matrix(u, **where).dense().any()
        empty = [M.shape[-2:] for M in mixing_matrices(m, u, **where)[0].matrices]
        assert empty == [(0, 0)] * (2 if packed else 1)


def test_a_stack_of_different_mixers_is_exact():
    encoder = Encoder(16, ["hydra", "attention", "toeplitz"], d_ff=24, d_state=4, headdim=8).double()
    u, grad = torch.randn(2, 1, 40, 16, dtype=torch.float64)
    pieces = [(0, torch.arange(s, e)) for s, e in PACKED.unfold(0, 2, 1)]
    check_alone(encoder, u, grad, pieces, cu_seqlens=PACKED)
    mask = torch.rand(1, 40) > 0.3
    u = u.masked_fill(~mask[..., None], NAN)
    check_alone(encoder, u, grad, [(0, mask[0].nonzero()[:, 0])], mask=mask)


def test_the_convolution_stops_at_document_borders():
    x, weight = torch.randn(1, 5, 2), torch.randn(2, 1, 7)
    documents = layout((1, 5), None, torch.tensor([0, 2, 5])).documents
    y = short_conv(x, weight, None, documents)
    torch.testing.assert_close(y[:, :2], short_conv(x[:, :2], weight, None))
    torch.testing.assert_close(y[:, 2:], short_conv(x[:, 2:], weight, None))


def test_the_convolution_and_its_gradients_are_those_of_the_library():
    x, weight = torch.randn(2, 11, 6, requires_grad=True), torch.randn(6, 1, 5, requires_grad=True)
    grad = torch.randn(2, 11, 6)
    expected = torch.nn.functional.conv1d(x.mT, weight, padding=2, groups=6).mT
    y = short_conv(x, weight, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, [x, weight], grad), torch.autograd.grad(expected, [x, weight], grad)
    )


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: short_conv(x, torch.ones(4, 1, 6), None), "weight must be (4, 1, an odd width) for x (2, 9, 4)"),
        (lambda x: short_conv(x, torch.ones(3, 1, 5), None), "for x (2, 9, 4), got (3, 1, 5)"),
        (lambda x: short_conv(x, torch.ones(4, 1, 5), torch.ones(1)), "bias must be (4,) for x (2, 9, 4), got (1,)"),
        (lambda x: short_conv(x[0], torch.ones(4, 1, 5), None), "x must be (batch, length, channels), got (9, 4)"),
        (lambda x: gated_rms_norm(x, x[:, :1], x[0, 0], 1e-5), "gate must be (2, 9, 4) and weight (4,), as y is"),
        (lambda x: gated_rms_norm(x, x, x[0, 0, :1], 1e-5), "got (2, 9, 4) and (1,)"),
    ],
)
def test_operands_that_would_be_broadcast_or_change_the_length_are_refused(f, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        f(torch.randn(2, 9, 4))


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (
            {"mask": torch.ones(2, 5)},
            TypeError,
            "mask must be bool, True for tokens, got torch.float32: pass mask.bool()",
        ),
        ({"mask": [[1] * 5] * 2}, TypeError, "mask must be a bool tensor, True for tokens, got list"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, "mask must be (batch, length) = (2, 5), got (2, 4)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "a batch of one packed row, got batch 2"),
    ],
)
def test_masks_that_do_not_fit_are_named(where, error, message):
    with pytest.raises(error) as raised:
        mixer("quasiseparable")(torch.randn(2, 5, 16, dtype=torch.float64), **where)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 4], "cu_seqlens must run from 0 to the row's length 5, got 0 to 4"),
        ([1, 5], "cu_seqlens must run from 0 to the row's length 5, got 1 to 5"),
        ([0, 3, 2, 5], "cu_seqlens must not decrease"),
        ([0], "offsets from 0 to 5, got (1,)"),
        ([0.0, 5.0], "cu_seqlens must be int32 or int64, got torch.float32"),
    ],
)
def test_offsets_that_do_not_fit_are_named(offsets, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        mixer("quasiseparable")(torch.randn(1, 5, 16, dtype=torch.float64), cu_seqlens=torch.tensor(offsets))
    assert message in str(raised.value)


def test_how_long_packed_documents_are_is_known_without_another_look_at_the_device():
    offsets = torch.tensor([0, 3, 3, 10, 12])
    mask = torch.arange(12)[None] != 5
    for place in (layout((1, 12), None, offsets), layout((1, 12), mask, offsets)):
        assert place.documents.at_most == 8  # of 7: few numbers, so that programs compiled for one serve many batches
        assert place.documents.to("cpu").at_most == 8 >= max(place.documents.lengths)
    assert layout((1, 12), mask, None).documents.at_most is None


def test_packed_attention_asks_for_little_more_than_the_longest_document(monkeypatch):
    asked = []

    def varlen(q, k, v, offsets, same, longest, _, scale):
        asked.append((longest, offsets.tolist()))
        parts = [slice(a, b) for a, b in pairwise(offsets.tolist())]
        scores = [torch.einsum("ihd,jhd->hij", q[own], k[own]) * scale for own in parts]
        return torch.cat(
            [torch.einsum("hij,jhp->ihp", s.softmax(-1), v[own]) for s, own in zip(scores, parts, strict=True)]
        )

    monkeypatch.setattr("hydra_ssm.matrices.attention._has_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    mixer, u = MatrixMixer(16, "attention", headdim=8, d_state=4), torch.randn(1, 12, 16)
    packed = mixer(u, cu_seqlens=torch.tensor([0, 3, 10, 12], dtype=torch.int32))
    assert asked == [(8, [0, 3, 10, 12])]
    alone = torch.cat([mixer(u[:, a:b]) for a, b in pairwise((0, 3, 10, 12))], dim=1)
    torch.testing.assert_close(packed, alone)
