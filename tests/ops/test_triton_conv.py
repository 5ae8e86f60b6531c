"""The convolution's kernels against float64: on the CPU through Triton's interpreter, on a GPU as they are."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hydra_ssm.ops import Documents, short_conv

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight", "bias", "W_D", "D")


def small():
    """Tiles so small that short rows have several of them, in both directions."""
    from hydra_ssm.ops.triton.conv import ConvConfig, ConvPlan

    tile = ConvConfig(rows=16, channels=16, warps=2, groups=2)
    return ConvPlan(forward=tile, diagonal=tile, gradient=tile, mirrored=tile)


def case(batch=2, length=37, channels=40, width=7, inner=24, heads=3, dtype=torch.float32):
    """Leaves in the order of NAMES; the parameters in float32, as under autocast."""
    shapes = ((batch, length, channels), (channels, 1, width), (channels,), (heads, inner), (heads,))
    leaves = [torch.randn(shape) / (inner**0.5 if k == 3 else 1) for k, shape in enumerate(shapes)]
    return [t.to(DEVICE, dtype if k == 0 else torch.float32) for k, t in enumerate(leaves)]


def padded(length: int) -> Documents:
    """Two rows, one with padding at its end."""
    place = torch.arange(length, device=DEVICE)
    return Documents(torch.stack([place * 0, torch.where(place < length - 5, 0, -1)]))


def packed(*lengths: int, padding: int = 0) -> Documents:
    """One row of documents back to back."""
    sizes = torch.tensor(lengths, device=DEVICE)
    ids = torch.arange(len(lengths), device=DEVICE).repeat_interleave(sizes)
    return Documents(F.pad(ids, (0, padding), value=-1)[None], F.pad(sizes.cumsum(0), (1, 0)))


def eager(leaves: list[Tensor], documents: Documents | None, activation: bool) -> tuple[Tensor, Tensor]:
    """y and d by definition, in the precision of x."""
    x, weight, bias, W_D, D = leaves
    x = x if documents is None else documents.zero_padding(x)
    y = short_conv(x, weight, bias, documents)
    y = F.silu(y) if activation else y
    y = y if documents is None else documents.zero_padding(y)
    return y, F.linear(y[..., : W_D.shape[1]], W_D.to(y.dtype), D.to(y.dtype))


def grads_of(leaves, documents, activation, dy, dd):
    """y, d and the gradients in the order of NAMES, by autograd."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y, d = eager(leaves, documents, activation)
    grads = torch.autograd.grad([y, d], leaves, [dy.to(y.dtype), dd.to(d.dtype)])
    return [y.detach(), d.detach(), *grads[:3]]


def kernels(leaves, documents, activation, dy, dd, dx, how):
    """The same by the kernels; W_D and D get their gradients elsewhere."""
    from hydra_ssm.ops.triton.conv import conv_backward, conv_forward

    x, weight, bias, W_D, D = leaves
    ids = None if documents is None else documents.ids
    y, d = conv_forward(x, weight, bias, ids, activation, (W_D, D), how=how)
    dweight, dbias = conv_backward(dy.clone(), x, weight, bias, ids, activation, dx, (dd, W_D), how=how)
    return [y, d, dx, dweight, dbias]


def error(a: Tensor, b: Tensor) -> float:
    """Relative where b is not zero."""
    assert a.shape == b.shape
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-12))


CASES = [
    ({"batch": 1}, None, True),
    ({"width": 3}, padded(37), True),
    ({"batch": 1, "channels": 37, "inner": 19, "width": 9}, packed(1, 20, 2, 3, 11), True),
    ({"batch": 1, "width": 5}, packed(13, 1, 16, padding=7), False),
    ({"length": 1, "heads": 20}, None, True),
]


@pytest.mark.parametrize(("shape", "documents", "activation"), CASES, ids=["rows", "padded", "odd", "packed", "one"])
def test_kernels_equal_the_convolution_and_its_gradients(shape, documents, activation, monkeypatch) -> None:
    """x and dx are slices of wider rows, x holds NaN at padding, and fresh memory holds NaN too."""
    leaves = case(**shape)
    batch, length, channels = leaves[0].shape
    dy, dd = torch.randn_like(leaves[0]), torch.randn(batch, length, len(leaves[4]), device=DEVICE)
    exact = grads_of([t.double() for t in leaves], documents, activation, dy, dd)
    wide = torch.full((batch, length, channels + 11), torch.nan, device=DEVICE)
    x = wide[..., 4 : 4 + channels]
    x.copy_(leaves[0])
    if documents is not None:
        for t in (x, dy, dd):
            t[~documents.valid] = torch.nan
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    dx = torch.full_like(wide, torch.nan)[..., 3 : 3 + channels]
    ours = kernels([x, *leaves[1:]], documents, activation, dy, dd, dx, small())
    for name, a, b in zip(("y", "d", *NAMES), ours, exact, strict=False):
        assert error(a, b) < 1e-5, name
    assert bool(wide[..., :4].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_as_exact_as_the_eager_form(dtype) -> None:
    leaves = case(batch=1, length=70, channels=160, inner=128, dtype=dtype)
    documents = packed(30, 33, padding=7)
    dy, dd = torch.randn_like(leaves[0]), torch.randn(1, 70, 3, device=DEVICE)
    exact = grads_of([t.double() for t in leaves], documents, True, dy, dd)
    theirs = grads_of(leaves, documents, True, dy, dd)
    from hydra_ssm.ops.triton.conv import PLAN

    ours = kernels(leaves, documents, True, dy, dd, torch.empty_like(leaves[0]), PLAN)
    unit = torch.finfo(dtype).eps / 2  # lucky sums of the eager form are no bar: half a rounding step is
    for name, a, b, e in zip(("y", "d", *NAMES), ours, theirs, exact, strict=False):
        assert error(a, e) <= 2 * error(b, e) + unit, name


def test_dx_may_be_the_memory_of_x_and_two_runs_agree() -> None:
    leaves = case(length=19, channels=20, inner=16)
    dy, dd = torch.randn_like(leaves[0]), torch.randn(2, 19, 3, device=DEVICE)
    args = (padded(19), True, dy, dd)
    once = kernels(leaves, *args, torch.empty_like(leaves[0]), small())
    for a, b in zip(once, kernels(leaves, *args, leaves[0], small()), strict=True):
        assert torch.equal(a, b)


def test_a_convolution_without_bias_and_diagonal() -> None:
    """The parameters keep their dtypes."""
    from hydra_ssm.ops.triton.conv import conv_backward, conv_forward

    x, weight, *_ = case(batch=1)
    weight, dy = weight.half(), torch.randn_like(x)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    exact = F.silu(short_conv(*wide, None))
    y, d = conv_forward(x, weight, None, None, True, how=small())
    assert d is None
    assert error(y, exact.detach()) < 1e-5
    grads = torch.autograd.grad(exact, wide, dy.double())
    dx = torch.empty_like(x)
    dweight, dbias = conv_backward(dy, x, weight, None, None, True, dx, how=small())
    assert dbias is None
    assert error(dx, grads[0]) < 1e-5
    assert dweight.dtype == torch.float16
    assert dweight.is_contiguous()
    assert error(dweight, grads[1]) < 1e-3
