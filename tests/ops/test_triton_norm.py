"""The gated norm's kernels against the eager form in float64."""

import importlib.util

import pytest
import torch
from torch import Tensor

from hydra_ssm.ops import gated_rms_norm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5


def case(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """dout, y, z, weight; z a slice of a wider projection, weight in float32 as under autocast."""
    dout, y = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    z = 3 * torch.randn(*shape[:2], shape[2] + 5, device=DEVICE).to(dtype)
    return [dout, y, z[..., 2:-3], 1 + torch.randn(shape[2], device=DEVICE)]


def eager(dout: Tensor, y: Tensor, z: Tensor, weight: Tensor) -> list[Tensor]:
    """out, dy, dz, dweight."""
    y, z, weight = leaves = [t.detach().requires_grad_() for t in (y, z, weight)]
    out = gated_rms_norm(y, z, weight, EPS)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def kernels(args: list[Tensor], elements: int = 64, stages: int = 1) -> list[Tensor]:
    """As `eager`; in place, and with fewer programs than there are tiles."""
    from hydra_ssm.ops.triton.norm import NormConfig, norm_backward, norm_forward

    dout, y, z, weight = args
    out, rstd = norm_forward(y, z, weight, EPS, NormConfig(elements, 3, 1, stages))
    dy, dz = y.clone(), torch.empty(*z.shape[:2], z.shape[2] + 7, dtype=z.dtype, device=DEVICE)[..., 4:-3].copy_(z)
    dweight = norm_backward(dout, dy, dz, weight, rstd, dy, dz, how=NormConfig(elements, 3, 1, stages)).weight
    return [out, dy, dz, dweight]


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 33), (3, 5, 16), (1, 3, 1536)], ids=str)
def test_kernels_in_place_are_as_exact_as_the_eager_form(shape, dtype) -> None:
    args = case(shape, dtype)
    exact = eager(*(t.double() for t in args))
    unit = torch.finfo(dtype).eps  # lucky sums of the eager form are no bar
    found = kernels(args)
    for name, ours, theirs, e in zip(("out", "dy", "dz", "dweight"), found, eager(*args), exact, strict=True):
        assert ours.dtype == theirs.dtype, name
        if e.norm() > 1e-3:  # a row of one number has almost no gradient
            assert error(ours, e) <= 2 * error(theirs, e) + unit, name


def test_gradients_may_go_elsewhere_and_every_element_is_written(monkeypatch) -> None:
    from hydra_ssm.ops.triton.norm import norm_backward, norm_forward

    dout, y, z, weight = args = case((2, 6, 40), torch.float32)
    kept = [t.clone() for t in args]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    out, rstd = norm_forward(y, z, weight, EPS)
    dy, together = torch.empty(y.shape).to(DEVICE), torch.empty(2, 6, 100).to(DEVICE)
    dz = together[..., 20:60]
    dweight = norm_backward(dout, y, z, weight, rstd, dy, dz).weight
    for ours, exact in zip((out, dy, dz, dweight), eager(*(t.double() for t in args)), strict=True):
        assert error(ours, exact) < 1e-6
    assert together[..., :20].isnan().all()  # nothing beside the view is touched
    assert together[..., 60:].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(args, kept, strict=True))


@pytest.mark.parametrize(("length", "heads", "width"), [(1, 1, 16), (7, 3, 16), (3, 2, 32)])
def test_the_gradient_of_a_diagonal_is_found_beside(length, heads, width) -> None:
    """x is a slice of wider rows."""
    from hydra_ssm.ops.triton.norm import NormConfig, norm_backward, norm_forward

    dout, y, z, weight = case((2, length, heads * width), torch.float32)
    x = torch.randn(2, length, heads * width + 9, device=DEVICE)[..., 4:-5].unflatten(-1, (heads, width))
    _, rstd = norm_forward(y, z, weight, EPS)
    dy, dz = torch.empty_like(y), torch.empty_like(z)
    alone = norm_backward(dout, y, z, weight, rstd, dy.clone(), dz, how=NormConfig(64, 3, 1))
    found = norm_backward(dout, y, z, weight, rstd, dy, dz, x, NormConfig(64, 3, 1))
    along = (dy.unflatten(-1, (heads, width)).double() * x).sum(-1)
    assert torch.equal(alone.weight, found.weight)
    assert error(found.diagonal, along) < 1e-6
    assert error(found.diagonal_sum, along.sum((0, 1))) < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's; SiLU is zero there
def test_huge_gates_and_empty_rows_stay_finite() -> None:
    dout, y, z, weight = case((1, 4, 16), torch.float32)
    y[0, 1] = 0.0
    z[0, 2] = torch.linspace(-1e4, 1e4, 16)
    exact = eager(*(t.double() for t in (dout, y, z, weight)))
    for ours, e in zip(kernels([dout, y, z, weight]), exact, strict=True):
        assert error(ours, e) < 1e-6


def test_operands_that_the_kernels_cannot_read_are_refused() -> None:
    from hydra_ssm.ops.triton.norm import norm_forward

    _, y, z, weight = case((2, 3, 8), torch.float32)
    with pytest.raises(ValueError, match="must be contiguous"):
        norm_forward(y.mT.contiguous().mT, z, weight, EPS)
    with pytest.raises(ValueError, match=r"must be \(2, 3, 8\) as y, got \(2, 3, 7\)"):
        norm_forward(y, z[..., 1:], weight, EPS)
