"""The convolution's kernels against float64: on the CPU through Triton's interpreter, on a GPU as they are."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hydra_ssm.ops import Documents, short_conv

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weight", "bias")


def small():
    """Stretches so short that rows have several of them, the last one cut off."""
    from hydra_ssm.ops.triton.conv import ConvConfig

    return ConvConfig(rows=16, channels=16, unroll=4)


def case(batch=2, length=37, channels=40, width=7, dtype=torch.float32):
    """Leaves in the order of NAMES; the parameters in float32, as under autocast."""
    leaves = [torch.randn(shape) for shape in ((batch, length, channels), (channels, 1, width), (channels,))]
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


def eager(leaves: list[Tensor], documents: Documents | None, activation: bool) -> Tensor:
    """y by definition, in the precision of x."""
    x, weight, bias = leaves
    x = x if documents is None else documents.zero_padding(x)
    y = short_conv(x, weight, bias, documents)
    y = F.silu(y) if activation else y
    return y if documents is None else documents.zero_padding(y)


def grads_of(leaves, documents, activation, dy):
    """y and the gradients in the order of NAMES, by autograd."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = eager(leaves, documents, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def kernels(leaves, documents, activation, dy, dx, how=None):
    """The same by the kernels."""
    from hydra_ssm.ops.triton.conv import BACKWARD, FORWARD, conv_backward, conv_forward

    x, weight, bias = leaves
    ids = None if documents is None else documents.ids
    y = conv_forward(x, weight, bias, ids, activation, how or FORWARD)
    return [y, dx, *conv_backward(dy, x, weight, bias, ids, activation, dx, how or BACKWARD)]


def error(a: Tensor, b: Tensor) -> float:
    """Relative where b is not zero."""
    assert a.shape == b.shape
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-12))


CASES = [
    ({"batch": 1}, None, True),
    ({"width": 3}, padded(37), True),
    ({"batch": 1, "channels": 37, "width": 9}, packed(1, 20, 2, 3, 11), True),
    ({"batch": 1, "width": 5}, packed(13, 1, 16, padding=7), False),
    ({"length": 1}, None, True),
    ({"length": 16}, None, True),
    ({"length": 17, "width": 9}, None, False),
]


@pytest.mark.parametrize(("shape", "documents", "activation"), CASES)
def test_kernels_equal_the_convolution_and_its_gradients(shape, documents, activation, monkeypatch) -> None:
    """x and dx are slices of wider rows, x holds NaN at padding, and fresh memory holds NaN too."""
    leaves = case(**shape)
    batch, length, channels = leaves[0].shape
    dy = torch.randn_like(leaves[0])
    exact = grads_of([t.double() for t in leaves], documents, activation, dy)
    wide = torch.full((batch, length, channels + 11), torch.nan, device=DEVICE)
    x = wide[..., 4 : 4 + channels]
    x.copy_(leaves[0])
    if documents is not None:
        for t in (x, dy):
            t[~documents.valid] = torch.nan
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    around = torch.full_like(wide, torch.nan)
    ours = kernels([x, *leaves[1:]], documents, activation, dy, around[..., 3 : 3 + channels], small())
    for name, a, b in zip(("y", *NAMES), ours, exact, strict=True):
        assert error(a, b) < 1e-5, name
    assert bool(around[..., :3].isnan().all() and around[..., 3 + channels :].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_as_exact_as_the_eager_form(dtype) -> None:
    leaves = case(batch=1, length=70, channels=160, dtype=dtype)
    documents = packed(30, 33, padding=7)
    dy = torch.randn_like(leaves[0])
    exact = grads_of([t.double() for t in leaves], documents, True, dy)
    theirs = grads_of(leaves, documents, True, dy)
    ours = kernels(leaves, documents, True, dy, torch.empty_like(leaves[0]))
    unit = torch.finfo(dtype).eps / 2  # lucky sums of the eager form are no bar: half a rounding step is
    for name, a, b, e in zip(("y", *NAMES), ours, theirs, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e) + unit, name


def last_program_first(monkeypatch) -> None:
    """Have the interpreter go through a grid from its end."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has an order of its own")
    from triton.runtime.interpreter import InterpreterBuilder

    place = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: place(self, self.grid_dim[0] - 1 - x, y, z)
    )


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("length", "width", "unroll"), [(1, 7, 8), (16, 7, 8), (17, 7, 8), (37, 7, 8), (31, 3, 8), (37, 9, 4)]
)
def test_dx_may_be_the_memory_of_x(length, width, unroll, backwards, monkeypatch) -> None:
    """Stretches follow each other in any order: what lies beside them must not be the new values, nor memory beyond."""
    if backwards:
        last_program_first(monkeypatch)
    leaves = case(length=length, channels=11, width=width)
    documents, dy = padded(length) if length > 5 else None, torch.randn_like(leaves[0])
    how = replace(small(), unroll=unroll)
    once = kernels(leaves, documents, True, dy, torch.empty_like(leaves[0]), how)
    empty = torch.empty

    def amid_nan(*shape, **options):
        size = torch.Size(shape[0] if len(shape) == 1 else shape)
        return empty(size.numel() + 999, **options).fill_(torch.nan)[: size.numel()].view(size)

    monkeypatch.setattr(torch, "empty", amid_nan)
    for a, b in zip(once, kernels(leaves, documents, True, dy, leaves[0], how), strict=True):
        assert torch.equal(a, b)


def test_a_convolution_without_bias() -> None:
    """The parameters keep their dtypes."""
    from hydra_ssm.ops.triton.conv import conv_backward, conv_forward

    x, weight, _ = case(batch=1)
    weight, dy = weight.half(), torch.randn_like(x)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    exact = F.silu(short_conv(*wide, None))
    assert error(conv_forward(x, weight, None, None, True, small()), exact.detach()) < 1e-5
    grads = torch.autograd.grad(exact, wide, dy.double())
    dx = torch.empty_like(x)
    dweight, dbias = conv_backward(dy, x, weight, None, None, True, dx, small())
    assert dbias is None
    assert dweight.dtype == torch.float16
    assert error(dx, grads[0]) < 1e-5
    assert error(dweight, grads[1]) < 1e-3


def test_a_stretch_that_is_no_multiple_of_its_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="a stretch must be a multiple of 8 rows, got 20"):
        replace(small(), rows=20, unroll=8)
