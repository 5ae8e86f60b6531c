"""All forms of the semiseparable product agree, values and gradients, for every direction, shift and packing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_ssm.ops import Documents, Triangle, layout, semiseparable
from hydra_ssm.ops.chunked import chunked
from hydra_ssm.ops.semiseparable import EAGER

FORMS = [name for name in EAGER if name != "recurrent"]


def problem(
    length, *, batch=2, heads=4, headdim=3, groups=2, state=5, strict=True, initial=False, uppers=(False, True)
):
    """x and triangles, all of them leaves of the graph."""
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64).requires_grad_()  # noqa: E731
    positive = lambda *shape: torch.rand(*shape, dtype=torch.float64).requires_grad_()  # noqa: E731
    A = (-2 * torch.rand(heads, dtype=torch.float64)).requires_grad_()
    S = leaf(heads, headdim, state) if initial else None
    shape = (batch, length, groups, state)
    triangles = [
        Triangle(positive(batch, length, heads), A, leaf(*shape), leaf(*shape), upper, strict, S) for upper in uppers
    ]
    return leaf(batch, length, heads, headdim), triangles


def gradients(x, triangles, documents, impl, grad):
    leaves = [x, triangles[0].A, *(t for tri in triangles for t in (tri.dt, tri.B, tri.C))]
    leaves += [triangles[0].initial] if triangles[0].initial is not None else []
    inside = documents.zero_padding if documents else lambda t: t
    ready = [Triangle(inside(t.dt), t.A, t.B, t.C, t.upper, t.strict, t.initial) for t in triangles]
    y = inside(semiseparable(inside(x), ready, documents, impl=impl))
    return y, torch.autograd.grad(y + 0 * x, leaves, grad, allow_unused=True, materialize_grads=True)


def agree(x, triangles, documents=None):
    grad = torch.randn_like(x)
    expected = gradients(x, triangles, documents, "recurrent", grad)
    for impl in FORMS:
        torch.testing.assert_close(gradients(x, triangles, documents, impl, grad), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
@pytest.mark.parametrize("strict", [True, False])
def test_dense_chunked_and_plain_equal_the_recurrence(length, strict):
    agree(*problem(length, strict=strict))


@given(
    length=st.integers(1, 150), heads=st.sampled_from([2, 4]), groups=st.sampled_from([1, 2]), strict=st.booleans(),
    initial=st.booleans(), uppers=st.sampled_from([(False,), (True,), (False, True)]), data=st.data(),
)  # fmt: skip
def test_packed_documents_with_padding_and_initial_states_agree(length, heads, groups, strict, initial, uppers, data):
    x, triangles = problem(length, batch=1, heads=heads, groups=groups, strict=strict, initial=initial, uppers=uppers)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=6))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    place = layout((1, length), kept[None], torch.tensor([0, *sorted(cuts), length]))
    agree(x, triangles, place.documents)


def test_padding_at_the_end_of_rows_agrees():
    x, triangles = problem(70, initial=True)
    lengths = torch.tensor([[33], [70]])
    agree(x, triangles, Documents(torch.where(torch.arange(70) < lengths, 0, -1)))


@pytest.mark.parametrize("impl", EAGER)
def test_a_diagonal_multiplies_each_token_alone(impl):
    x, triangles = problem(9)
    diagonal = torch.randn(2, 9, 4, dtype=torch.float64)
    y = semiseparable(x, triangles, impl=impl) + diagonal[..., None] * x
    torch.testing.assert_close(semiseparable(x, triangles, diagonal=diagonal, impl=impl), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 100])
def test_the_chunk_size_does_not_change_the_result(chunk_size):
    x, triangles = problem(37)
    torch.testing.assert_close(chunked(x, triangles, None, chunk_size), chunked(x, triangles, None), rtol=0, atol=1e-12)


def test_a_backward_pass_under_autocast_keeps_the_precision_of_the_forward_pass():
    x, triangles = problem(90)
    y = semiseparable(x.float(), [replace(t, dt=t.dt.float(), B=t.B.float(), C=t.C.float()) for t in triangles]).sum()
    leaves = [x, *(part for t in triangles for part in (t.dt, t.B, t.C))]
    wanted = torch.autograd.grad(y, leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_steps_of_zero_leave_the_state_alone_and_give_finite_gradients():
    x, triangles = problem(130)
    still = [Triangle(torch.zeros_like(t.dt).requires_grad_(), t.A, t.B, t.C, t.upper, True) for t in triangles]
    agree(x, still)
    assert semiseparable(x, still).abs().max() == 0


def test_strong_decay_neither_overflows_nor_gives_nan():
    x, triangles = problem(200)
    strong = [Triangle(t.dt.detach() * 1e4, t.A, t.B, t.C, t.upper, True) for t in triangles]
    y = semiseparable(x.float(), [Triangle(t.dt.float(), t.A, t.B.float(), t.C.float(), t.upper, True) for t in strong])
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert triangles[0].A.grad.isfinite().all()


def test_an_infinite_decay_in_one_document_leaves_the_others_alone():
    x, triangles = problem(40, batch=1)
    documents = layout((1, 40), None, torch.tensor([0, 20, 40])).documents
    calm = semiseparable(x, triangles, documents)
    wild = []
    for t in triangles:
        dt = t.dt.detach().clone()
        dt[:, 3] = 1e300
        wild.append(Triangle(dt * torch.finfo(torch.float64).max ** 0.02, t.A, t.B, t.C, t.upper, True))
    scale = torch.finfo(torch.float64).max ** 0.02
    expected = semiseparable(x, [Triangle(t.dt * scale, t.A, t.B, t.C, t.upper, True) for t in triangles], documents)
    assert calm.isfinite().all()
    torch.testing.assert_close(semiseparable(x, wild, documents)[:, 20:], expected[:, 20:], rtol=0, atol=1e-9)


def test_what_no_row_reads_has_a_gradient_of_exactly_zero():
    x, (causal, anticausal) = problem(9)
    semiseparable(x, [causal, anticausal]).square().sum().backward()
    for t, unused in ((causal, -1), (anticausal, 0)):
        for part in (t.dt, t.B, t.C):
            assert part.grad[:, unused].abs().max() == 0
            assert part.grad.abs().max() > 0


def test_float32_and_bfloat16_stay_close_to_float64():
    x, triangles = problem(300, heads=2, headdim=16, state=16, groups=1)
    exact = semiseparable(x, triangles, impl="recurrent")
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        cast = [Triangle(t.dt.float(), t.A.float(), t.B.to(dtype), t.C.to(dtype), t.upper, True) for t in triangles]
        y = semiseparable(x.to(dtype), cast)
        assert y.dtype == dtype
        assert (y - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl must be one of recurrent, dense, chunked, plain, triton, got 'fast'"),
        ({"x": (2, 0, 4, 3)}, "none of them 0, got \\(2, 0, 4, 3\\)"),
        ({"x": (2, 7, 4, 3)}, "dt must be \\(2, 7, 4\\) for x \\(2, 7, 4, 3\\), got \\(2, 9, 4\\)"),
        ({"x": (2, 9, 3, 3)}, "the groups of B and C must divide the 3 heads, got 2"),
        ({"documents": (2, 8)}, "documents must number \\(2, 9\\) tokens, got \\(2, 8\\)"),
        ({"triangles": []}, "at least one triangle"),
        ({"diagonal": (2, 9)}, "diagonal must be \\(2, 9, 4\\) for x \\(2, 9, 4, 3\\), got \\(2, 9\\)"),
        ({"dt": torch.bfloat16}, "dt must be float32 or float64, as its sums are exponents, got torch.bfloat16"),
    ],
)
def test_misfits_are_named(change, message):
    x, triangles = problem(9)
    x = torch.zeros(change["x"], dtype=torch.float64) if "x" in change else x
    documents = Documents(torch.zeros(change["documents"], dtype=torch.long)) if "documents" in change else None
    diagonal = torch.zeros(change["diagonal"]) if "diagonal" in change else None
    if "dt" in change:
        triangles = [replace(t, dt=t.dt.to(change["dt"])) for t in triangles]
    with pytest.raises((ValueError, TypeError), match=message):
        semiseparable(x, change.get("triangles", triangles), documents, diagonal=diagonal, impl=change.get("impl"))
