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
    from hydra_ssm.ops.triton.feature_grads import FeatureGradsConfig
    from hydra_ssm.ops.triton.output import OutputConfig
    from hydra_ssm.ops.triton.plan import Plan
    from hydra_ssm.ops.triton.states import StatesConfig
    from hydra_ssm.ops.triton.value_grads import ValueGradsConfig

    rows = chunk // 2
    return Plan(
        chunk=chunk,
        states=StatesConfig(heads=1 if local else heads, local=local),
        output=OutputConfig(heads=heads, rows=rows),
        value_grads=ValueGradsConfig(heads=heads, pair=pair),
        feature_grads=FeatureGradsConfig(rows=rows),
    )


CASES = [
    ({}, (32, 2, False, True)),
    ({"documents": True}, (32, 1, True, False)),
    (
        {"batch": 2, "length": 35, "heads": 4, "groups": 2, "state": 32, "documents": True, "strong": 4.0},
        (32, 2, False, True),
    ),
    ({"length": 1}, (32, 1, False, False)),
    ({"length": 2, "width": 64}, (32, 1, True, True)),
    ({"length": 67, "width": 32, "state": 64}, (64, 2, True, True)),
]


@pytest.mark.parametrize(("shape", "how"), CASES, ids=str)
def test_kernels_equal_the_recurrence_and_its_gradients(shape, how) -> None:
    from hydra_ssm.ops.triton import quasiseparable_backward, quasiseparable_forward

    args = case(**shape)
    dy = torch.randn_like(args[0])
    y, grads = exact(args, dy)
    assert error(quasiseparable_forward(*args, how=plan(*how)), y) < 1e-5
    for name, ours, theirs in zip(NAMES, quasiseparable_backward(dy, *args, how=plan(*how)), grads, strict=True):
        assert error(ours, theirs) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_as_exact_as_the_eager_form(dtype) -> None:
    from hydra_ssm.ops.triton import quasiseparable_backward, quasiseparable_forward

    args = case(length=70, width=32, state=32, documents=True, dtype=dtype)
    dy = torch.randn_like(args[0])
    y, grads = exact(args, dy)
    leaves = [t if k == 8 else t.detach().requires_grad_() for k, t in enumerate(args)]
    eager = recurrence(leaves, "chunked")
    theirs = torch.autograd.grad(eager, [t for k, t in enumerate(leaves) if k != 8], dy.to(eager.dtype))
    how = plan(64, 2, False, True)
    unit = torch.finfo(dtype).eps / 2  # lucky sums of the eager form are no bar: half a rounding step is
    assert error(quasiseparable_forward(*args, how=how), y) <= 2 * error(eager, y) + unit
    ours = quasiseparable_backward(dy, *args, how=how)
    for name, a, b, e in zip(NAMES, ours, theirs, grads, strict=True):
        assert error(a, e) <= 2 * error(b, e) + unit, name


def test_strided_inputs_and_poisoned_memory(monkeypatch) -> None:
    """The layer's tensors are slices of one projection; every element of a result is written."""
    from hydra_ssm.ops.triton import quasiseparable_backward, quasiseparable_forward

    x, dt_f, dt_b, A, *features, ids, diagonal = case(length=21)
    together = torch.cat([x.flatten(2), *(f.flatten(2) for f in features)], -1)
    views = together.split([32, 16, 16, 16, 16], -1)
    strided = (views[0].unflatten(-1, (2, 16)), dt_f, dt_b, A, *(v[:, :, None] for v in views[1:]), ids, diagonal)
    how, dy = plan(16, 2, False, False), torch.randn_like(x)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    packed = (x, dt_f, dt_b, A, *features, ids, diagonal)
    assert torch.equal(quasiseparable_forward(*strided, how=how), quasiseparable_forward(*packed, how=how))
    for a, b in zip(
        quasiseparable_backward(dy, *strided, how=how), quasiseparable_backward(dy, *packed, how=how), strict=True
    ):
        assert torch.equal(a, b)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, hydra_ssm; sys.exit('hydra_ssm.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
