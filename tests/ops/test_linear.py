"""Projections: gradients of float32 weights are not rounded to 16 bits on their way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")

from hydra_ssm import Hydra
from hydra_ssm.ops import linear
from hydra_ssm.ops.linear import _Linear
from hydra_ssm.ops.triton.sums import column_sums
from hydra_ssm.ops.triton.transpose import transposed

HERE = "cuda" if torch.cuda.is_available() else "cpu"


def test_gradients_of_a_projection_are_those_of_torch_and_of_second_order_too() -> None:
    torch.manual_seed(0)
    u, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3), (7, 3), (7,)))
    assert torch.equal(_Linear.apply(u, weight, bias, False), F.linear(u, weight, bias))
    assert torch.autograd.gradcheck(_Linear.apply, (u, weight, bias, False))
    assert torch.autograd.gradgradcheck(_Linear.apply, (u, weight, bias, False))


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("outputs", [30, 130], ids=["narrow", "wide"])
def test_a_weight_in_float32_gets_a_gradient_of_float32_digits(outputs, triton, over, monkeypatch) -> None:
    monkeypatch.setattr(linear, "HAS_TRITON", triton)
    torch.manual_seed(0)
    u = torch.randn(2, 200, 24, device=HERE).bfloat16().requires_grad_()
    weight = torch.randn(outputs, 24, device=HERE, requires_grad=True)
    bias = torch.randn(outputs, device=HERE, requires_grad=True)
    dy = torch.randn(2, 200, outputs, device=HERE).bfloat16()
    values = u.detach().clone()
    y = _Linear.apply(u, weight, bias, over)
    with torch.autocast(HERE, torch.bfloat16):  # a backward pass within it is the same
        y.backward(dy)
    exact = dy.double().flatten(0, 1).T @ values.double().flatten(0, 1)
    assert weight.grad.dtype == torch.float32
    assert weight.grad.is_contiguous()
    assert (weight.grad - exact).norm() <= 1e-6 * exact.norm()  # 2e-3 where it is rounded
    assert torch.equal(u.grad, dy @ weight.detach().bfloat16())
    torch.testing.assert_close(bias.grad.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_a_second_derivative_knows_the_weight_and_not_its_copy() -> None:
    torch.manual_seed(0)
    u = torch.randn(2, 20, 12, device=HERE).bfloat16().requires_grad_()
    weight = torch.randn(10, 12, device=HERE, requires_grad=True)
    found = []
    for y in (_Linear.apply(u, weight, None, False), F.linear(u, weight.to(u.dtype))):
        (du,) = torch.autograd.grad(y.float().square().sum(), u, create_graph=True)
        found.append(torch.autograd.grad(du.float().square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("over", [False, True])
def test_gradients_of_a_batch_of_outputs_are_those_of_each(over) -> None:
    torch.manual_seed(0)
    u = torch.randn(2, 5, 8, device=HERE).bfloat16().requires_grad_()
    weight, bias = torch.randn(40, 8, device=HERE, requires_grad=True), torch.zeros(40, device=HERE, requires_grad=True)
    y = _Linear.apply(u, weight, bias, over)
    dys = torch.randn(3, *y.shape, device=HERE).bfloat16()
    each = [torch.autograd.grad(y, (u, weight, bias), dy, retain_graph=True) for dy in dys]
    for found, *expected in zip(
        torch.autograd.grad(y, (u, weight, bias), dys, is_grads_batched=True), *each, strict=True
    ):
        # Of a batch the weight's are rounded to 16 bits.
        torch.testing.assert_close(found, torch.stack(expected), rtol=2**-8, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(HERE == "cpu", reason="needs CUDA")
def test_what_has_no_such_gradient_is_torchs_linear() -> None:
    """Frozen weights, no gradients, transforms, forward mode, other types."""
    u, weight = torch.randn(2, 5, 8, device="cuda"), torch.randn(6, 8, device="cuda", requires_grad=True)

    def name(u: torch.Tensor, weight: torch.Tensor) -> str:
        with torch.autocast("cuda", torch.bfloat16):
            return type(linear.first_linear(u, weight, None).grad_fn).__name__

    assert name(u, weight) == "_LinearBackward"
    assert name(u, weight.detach()) == "NoneType"
    with torch.no_grad():
        assert name(u, weight) == "NoneType"
    with torch.autograd.forward_ad.dual_level():
        assert name(u, weight) != "_LinearBackward"


@pytest.mark.gpu
@pytest.mark.skipif(HERE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("form", ["kernels", "parts"])
def test_a_layer_rounds_no_weight_gradient(form) -> None:
    """Of both projections; in parts, that of the second is torch's."""
    torch.manual_seed(0)
    layer = Hydra(64, headdim=16, d_state=16, impl=None if form == "kernels" else "chunked").cuda()
    with torch.autocast("cuda", torch.bfloat16):
        layer(torch.randn(2, 100, 64, device="cuda")).square().sum().backward()
    for part in (layer.in_proj, layer.out_proj)[: 2 if form == "kernels" else 1]:
        assert part.weight.grad.is_contiguous()
        assert not torch.equal(part.weight.grad, part.weight.grad.bfloat16().float())


@given(rows=st.integers(1, 150), columns=st.integers(1, 150))
@settings(max_examples=20, deadline=None)
def test_a_matrix_is_transposed(rows, columns) -> None:
    a = torch.randn(rows, columns + 3, device=HERE)[:, 1 : columns + 1]
    assert torch.equal(transposed(a), a.T)
    assert transposed(a).is_contiguous()


@given(rows=st.integers(0, 600), first=st.integers(1, 70), second=st.integers(0, 70))
@settings(max_examples=20, deadline=None)
def test_columns_are_summed_in_two_dtypes(rows, first, second) -> None:
    table = torch.randn(rows, first + second, device=HERE)
    a, b = column_sums(table, first, torch.float32, torch.bfloat16)
    exact = table.double().sum(0)
    assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(a.double(), exact[:first], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.double(), exact[first:], rtol=8e-3, atol=1e-4)
