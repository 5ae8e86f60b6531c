"""The Triton kernels against the float64 recurrence: on the CPU through Triton's interpreter, on a GPU as they are."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hydra_ssm.ops import Documents, Triangle, semiseparable

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt_f", "dt_b", "A", "B_f", "C_f", "B_b", "C_b", "diagonal")
RAW_NAMES = (*NAMES[:4], "bias", *NAMES[4:])


def case(batch=1, length=40, heads=2, width=16, groups=1, state=16, documents=False, dtype=torch.float32, strong=1.0):
    """(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, diagonal)."""
    x = torch.randn(batch, length, heads, width)
    features = [torch.randn(batch, length, groups, state) / state**0.5 for _ in range(4)]
    dt_f, dt_b = (torch.rand(batch, length, heads) * strong for _ in range(2))
    dt_f[:, length // 2] = 0.0
    ids = (torch.rand(batch, length) < 0.15).cumsum(1) if documents else None
    args = (x, dt_f, dt_b, -torch.rand(heads) - 0.1, *features, ids, torch.randn(batch, length, heads))
    half = (0, 4, 5, 6, 7, 9)
    return tuple(t if t is None else t.to(DEVICE, dtype if k in half else None) for k, t in enumerate(args))


def forward(args, how=None) -> Tensor:
    """The kernels' product."""
    from hydra_ssm.ops.triton import Steps, quasiseparable_forward

    return quasiseparable_forward(args[0], Steps(*args[1:4]), *args[4:], how=how)[0]


def backward(dy, args, how=None) -> list[Tensor]:
    """The kernels' gradients, in the order of NAMES."""
    from hydra_ssm.ops.triton import Steps, quasiseparable_backward

    grads = quasiseparable_backward(dy, args[0], Steps(*args[1:4]), *args[4:], how=how)
    assert grads[4] is None
    return [*grads[:4], *grads[5:]]


def recurrence(args, impl="recurrent") -> Tensor:
    """The product by definition, in the precision of the arguments."""
    x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, diagonal = args
    triangles = [Triangle(dt_f, A, B_f, C_f, strict=True), Triangle(dt_b, A, B_b, C_b, upper=True, strict=True)]
    documents = None if ids is None else Documents(ids)
    return semiseparable(x, triangles, documents, impl=impl) + x * diagonal[..., None]


def exact(args, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The product in float64 and its gradients, in the order of NAMES."""
    wide = [t if k == 8 else t.double().requires_grad_() for k, t in enumerate(args)]
    y = recurrence(wide)
    leaves = [t for k, t in enumerate(wide) if k != 8]
    return y.detach(), list(torch.autograd.grad(y, leaves, dy.double(), materialize_grads=True))


def error(a: Tensor, b: Tensor) -> float:
    """Relative where b is not zero."""
    return float((a.detach().double() - b).norm() / b.norm().clamp(min=1e-12))


def plan(chunk: int, heads: int, local: bool, pair: bool):
    from hydra_ssm.ops.triton.output import OutputConfig
    from hydra_ssm.ops.triton.plan import Plan
    from hydra_ssm.ops.triton.states import StatesConfig

    rows = chunk // 2
    return Plan(
        chunk=chunk,
        states=StatesConfig(heads=1 if local else heads, local=local),
        output=OutputConfig(heads=heads, rows=rows),
        pair=pair,
    )


CASES = [
    ({}, (32, 2, False, False)),
    ({"length": 32}, (32, 2, False, True)),
    ({"length": 29, "heads": 4, "groups": 2, "documents": True, "strong": 4.0}, (32, 2, False, True)),
    ({"length": 13, "width": 32}, (32, 1, False, True)),
    ({"documents": True}, (32, 1, True, False)),
    (
        {"batch": 2, "length": 35, "heads": 4, "groups": 2, "state": 32, "documents": True, "strong": 4.0},
        (32, 2, False, False),
    ),
    ({"length": 1}, (32, 1, False, False)),
    ({"length": 2, "width": 64}, (32, 1, True, True)),
    ({"length": 67, "width": 32, "state": 64}, (64, 2, True, False)),
]


@pytest.mark.parametrize(("shape", "how"), CASES, ids=str)
def test_kernels_equal_the_recurrence_and_its_gradients(shape, how) -> None:
    args = case(**shape)
    dy = torch.randn_like(args[0])
    y, grads = exact(args, dy)
    assert error(forward(args, plan(*how)), y) < 1e-5
    for name, ours, theirs in zip(NAMES, backward(dy, args, plan(*how)), grads, strict=True):
        assert error(ours, theirs) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_as_exact_as_the_eager_form(dtype) -> None:
    args = case(length=70, width=32, state=32, documents=True, dtype=dtype)
    dy = torch.randn_like(args[0])
    y, grads = exact(args, dy)
    leaves = [t if k == 8 else t.detach().requires_grad_() for k, t in enumerate(args)]
    eager = recurrence(leaves, "chunked")
    theirs = torch.autograd.grad(eager, [t for k, t in enumerate(leaves) if k != 8], dy.to(eager.dtype))
    how = plan(64, 2, False, False)
    unit = torch.finfo(dtype).eps / 2  # lucky sums of the eager form are no bar: half a rounding step is
    assert error(forward(args, how), y) <= 2 * error(eager, y) + unit
    ours = backward(dy, args, how)
    for name, a, b, e in zip(NAMES, ours, theirs, grads, strict=True):
        assert error(a, e) <= 2 * error(b, e) + unit, name


def test_strided_inputs_and_poisoned_memory(monkeypatch) -> None:
    """The layer's tensors are slices of one projection; every element of a result is written."""
    x, dt_f, dt_b, A, *features, ids, diagonal = case(length=21)
    together = torch.cat([x.flatten(2), *(f.flatten(2) for f in features)], -1)
    views = together.split([32, 16, 16, 16, 16], -1)
    strided = (views[0].unflatten(-1, (2, 16)), dt_f, dt_b, A, *(v[:, :, None] for v in views[1:]), ids, diagonal)
    how, dy = plan(16, 2, False, False), torch.randn_like(x)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    packed = (x, dt_f, dt_b, A, *features, ids, diagonal)
    assert torch.equal(forward(strided, how), forward(packed, how))
    for a, b in zip(backward(dy, strided, how), backward(dy, packed, how), strict=True):
        assert torch.equal(a, b)


def raw_case(length=40, limits=(0.0, torch.inf), own_A=False, **options):
    """(arguments with raw steps in one projection's slices, arguments in float64 and all leaves)."""
    x, dt_f, _, _, *features, ids, diagonal = case(length=length, **options)
    heads = dt_f.shape[2]
    raw = torch.randn(*dt_f.shape[:2], 2, heads, device=DEVICE) - 1.5
    A_log = torch.randn(*((2,) if own_A else ()), heads, device=DEVICE) / 2
    bias = torch.randn(heads, device=DEVICE)
    return x, raw, A_log, bias, limits, *features, ids, diagonal


def raw_exact(args, dy):
    """The product from raw steps in float64, and the gradients of RAW_NAMES."""
    leaves = [t.double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    x, raw, A_log, bias, limits, *features, ids, diagonal = leaves
    dt = torch.nn.functional.softplus(raw + bias).clamp(*limits)
    if ids is not None:
        dt = dt * (ids >= 0)[:, :, None, None]
    A_f, A_b = (-A_log.exp()).expand(2, -1)
    B_f, C_f, B_b, C_b = features
    triangles = [
        Triangle(dt[:, :, 0], A_f, B_f, C_f, strict=True), Triangle(dt[:, :, 1], A_b, B_b, C_b, upper=True, strict=True)
    ]  # fmt: skip
    documents = None if ids is None else Documents(ids)
    y = semiseparable(x, triangles, documents, impl="recurrent") + x * diagonal[..., None]
    leaves = [x, raw, A_log, bias, *features, diagonal]
    dx, draw, *rest = torch.autograd.grad(y, leaves, dy.double())
    return y.detach(), [dx, draw[:, :, 0], draw[:, :, 1], *rest]


RAW = {
    "one chunk": {"length": 21},
    "chunks": {"documents": True, "own_A": True},
    "limits": {"limits": (0.2, 0.9)},
    "padding": {"padded": 13, "limits": (0.01, 2.0)},
}


@pytest.mark.parametrize("options", RAW.values(), ids=RAW)
def test_raw_steps_equal_softplus_limits_and_padding_in_float64(options) -> None:
    from hydra_ssm.ops.triton import Into, Steps, quasiseparable_backward, quasiseparable_forward

    options = dict(options)
    padded = options.pop("padded", 0)
    x, raw, A_log, bias, limits, *features, ids, diagonal = raw_case(**options)
    if padded:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=DEVICE)
        ids[:, -padded:] = -1
        x = x * (ids >= 0)[:, :, None, None]
        features = [t * (ids >= 0)[:, :, None, None] for t in features]
    dy = torch.randn_like(x)
    y, grads = raw_exact((x, raw, A_log, bias, limits, *features, ids, diagonal), dy)
    steps = Steps(raw[:, :, 0], raw[:, :, 1], A_log, bias, limits)
    how = plan(32, 2, False, True)
    found, states = quasiseparable_forward(x, steps, *features, ids, diagonal, how=how)
    assert error(found, y) < 1e-5
    buffer = torch.full_like(raw, torch.nan)  # as the steps lie, so their gradients
    into = Into(ddt_f=buffer[:, :, 0], ddt_b=buffer[:, :, 1])
    ours = quasiseparable_backward(dy, x, steps, *features, ids, diagonal, states, how=how, into=into)
    assert ours[1].data_ptr() == buffer.data_ptr()
    for name, a, b in zip(RAW_NAMES, ours, grads, strict=True):
        assert error(a, b) < 1e-5, name
    if padded:
        assert buffer[:, -padded:].count_nonzero() == 0
    again = quasiseparable_backward(dy, x, steps, *features, ids, diagonal, how=how)
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, hydra_ssm; sys.exit('hydra_ssm.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
