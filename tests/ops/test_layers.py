"""The convolution and the gated norm as operators: what chooses them, and that every mixer runs on them unchanged."""

import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor

from hydra_ssm import MATRICES, MatrixMixer, parameters
from hydra_ssm.ops import backend, gated_rms_norm, layout, short_conv

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # of the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
DATA_DEPENDENT = [name for name, c in MATRICES.items() if c.data_dependent]


def conv_case(dtype=torch.float32, bias=True, requires_grad=True) -> list[Tensor | None]:
    """x, a slice of a wider projection; weight; bias."""
    x = torch.randn(2, 9, 26, device=DEVICE, dtype=dtype)[..., 3:-3]
    leaves = [x, torch.randn(20, 1, 5, device=DEVICE), torch.randn(20, device=DEVICE) if bias else None]
    return [None if t is None else t.detach().requires_grad_(requires_grad) for t in leaves]


def norm_case(dtype=torch.float32, requires_grad=True) -> list[Tensor]:
    """y, z, a slice of a wider projection, and weight."""
    y, z = torch.randn(2, 5, 24, device=DEVICE, dtype=dtype), torch.randn(2, 5, 30, device=DEVICE, dtype=dtype)
    weight = 1 + torch.randn(24, device=DEVICE)
    return [t.detach().requires_grad_(requires_grad) for t in (y, z[..., 2:-4], weight)]


def padding() -> Tensor:
    """Numbers of a document in each row of 2 x 9 tokens, one with padding."""
    ids = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)
    ids[1, 6:] = -1
    return ids


@pytest.mark.parametrize(("bias", "ids"), [(True, True), (False, False)])
def test_the_convolution_is_the_operator_that_pytorch_expects(bias, ids) -> None:
    import hydra_ssm.ops.triton.layers  # noqa: F401

    operators, numbers = torch.ops.hydra_ssm, padding() if ids else None
    torch.library.opcheck(operators.short_conv.default, (*conv_case(bias=bias), numbers, True))
    plain = conv_case(bias=bias, requires_grad=False)
    torch.library.opcheck(
        operators.short_conv_backward.default, (torch.randn(2, 9, 20, device=DEVICE), *plain, numbers, True)
    )


def test_the_norm_is_the_operator_that_pytorch_expects() -> None:
    import hydra_ssm.ops.triton.layers  # noqa: F401

    operators = torch.ops.hydra_ssm
    torch.library.opcheck(operators.gated_rms_norm.default, (*norm_case(), EPS))
    y, z, weight = norm_case(requires_grad=False)
    rstd = operators.gated_rms_norm(y, z, weight, EPS)[1]
    torch.library.opcheck(operators.gated_rms_norm_backward.default, (torch.randn_like(y), y, z, weight, rstd))


def convolved(leaves, impl) -> Tensor:
    return short_conv(*leaves, activation=True, impl=impl)


def normed(leaves, impl) -> Tensor:
    return gated_rms_norm(*leaves, EPS, impl=impl)


OPERATIONS = pytest.mark.parametrize(("f", "case"), [(convolved, conv_case), (normed, norm_case)])


@OPERATIONS
def test_operators_equal_the_eager_forms_and_their_gradients(f, case) -> None:
    found = []
    for impl, dtype in (("triton", None), ("eager", torch.float64)):
        torch.manual_seed(0)
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in case()]
        y = f(leaves, impl)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


@OPERATIONS
def test_compile_takes_the_whole_graph_and_changes_nothing(f, case) -> None:
    leaves = case()
    whole = torch.compile(partial(f, impl="triton"), fullgraph=True, backend="aot_eager")
    found = [(y := g(leaves), *torch.autograd.grad(y.sum(), leaves)) for g in (partial(f, impl="triton"), whole)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@OPERATIONS
def test_a_gradient_of_the_gradient_is_refused(f, case) -> None:
    leaves = case()
    (grad,) = torch.autograd.grad(f(leaves, "triton").square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@OPERATIONS
def test_autocast_gives_the_dtypes_of_the_eager_forms(f, case) -> None:
    for dtype in (torch.float32, torch.float16):
        leaves = case(dtype)
        with torch.autocast(DEVICE, torch.float16):
            ours, eager = (f(leaves, impl) for impl in ("triton", "eager"))
        assert ours.dtype == eager.dtype
        assert (ours - eager).norm() < 1e-3 * eager.norm()
        grads = torch.autograd.grad(ours.float().sum(), leaves)
        assert [g.dtype for g in grads] == [t.dtype for t in leaves]


def test_strides_of_any_kind_are_read() -> None:
    x, weight, bias = conv_case(requires_grad=False)
    strided = [
        x.mT.contiguous().mT,
        weight.expand(2, -1, -1, -1).mT.contiguous().mT[0],
        bias[:, None].expand(-1, 3).T[1],
    ]
    assert torch.equal(convolved(strided, "triton"), convolved([x, weight, bias], "triton"))
    y, z, weight = norm_case(requires_grad=False)
    strided = [y.mT.contiguous().mT, z.mT.contiguous().mT, weight]
    assert torch.equal(normed(strided, "triton"), normed([y, z, weight], "triton"))


CONV_MISFITS = {
    "float64": (lambda x, w, b: (x.double(), w, b), "float32, float16 or bfloat16, got torch.float64"),
    "one tap": (lambda x, w, b: (x, w[..., :1], b), "a convolution over 3, 5, 7, 9 tokens, got 1"),
    "devices": (lambda x, w, b: (x, w.to("meta"), b), "all tensors on one device, got .* and meta"),
}


@pytest.mark.parametrize(("change", "message"), CONV_MISFITS.values(), ids=CONV_MISFITS)
def test_a_convolution_by_triton_runs_or_says_what_it_needs(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        short_conv(*change(*conv_case()), impl="triton")


def test_a_norm_by_triton_runs_or_says_what_it_needs() -> None:
    y, z, weight = norm_case()
    with pytest.raises(ValueError, match=r"y and gate \(batch, length, width\) alike, got \(5, 24\) and \(5, 24\)"):
        gated_rms_norm(y[0], z[0], weight, EPS, impl="triton")
    wide = torch.zeros(1, 1, 16385, device=DEVICE)
    with pytest.raises(ValueError, match="a norm of rows of at most 16384, got 16385"):
        gated_rms_norm(wide, wide, wide[0, 0], EPS, impl="triton")
    assert gated_rms_norm(wide, wide, wide[0, 0], EPS).isfinite().all()


@OPERATIONS
def test_names_are_known_and_eager_is_eager(f, case, monkeypatch) -> None:
    with pytest.raises(ValueError, match="impl must be triton or eager, got 'chunked'"):
        f(case(), "chunked")
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(ImportError, match="triton, which is not installed"):
        f(case(), "triton")
    assert f(case(), "eager").shape == f(case(), None).shape


def test_what_is_compiled_is_not_taken_for_what_is_exported() -> None:
    """As torch 2.11 does where it is asked."""

    class Told(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if backend.exporting() else x

    zero = torch.zeros(1)
    assert torch.compile(Told(), fullgraph=True, backend="eager")(zero) == 0
    assert torch.export.export(Told(), (zero,)).module()(zero) == 1


def test_padding_is_not_read_whatever_stands_there() -> None:
    documents = layout((1, 9), torch.arange(9, device=DEVICE)[None] < 6, None).documents
    x, weight, bias = (t.detach() for t in conv_case())
    x = x[:1]
    broken = documents.zero_padding(x).masked_fill(~documents.valid[..., None], torch.nan)
    for impl in ("triton", "eager"):
        y = short_conv(broken, weight, bias, documents, impl=impl)
        assert y.isfinite().all()
        torch.testing.assert_close(y[:, :6], short_conv(x[:, :6], weight, bias, impl="eager"))


def trained(mixer: MatrixMixer, where: str, draws: Tensor) -> list[Tensor]:
    """The outputs and all gradients, of several draws: in one alone a gradient may cancel to what rounding leaves."""
    return [torch.stack(found) for found in zip(*(trained_once(mixer, where, u) for u in draws), strict=True)]


def trained_once(mixer: MatrixMixer, where: str, u: Tensor) -> list[Tensor]:
    if where == "mask":
        mask = torch.ones(u.shape[:2], dtype=torch.bool, device=DEVICE)
        mask[1, 2:4] = mask[1, 9:] = False
        u, options = u.masked_fill(~mask[..., None], torch.nan), {"mask": mask}
    else:
        u, options = u.reshape(1, -1, u.shape[-1]), {"cu_seqlens": torch.tensor([0, 1, 14, 22], device=DEVICE)}
    u = u.detach().requires_grad_()
    y = mixer(u, **options)
    weights = torch.arange(y.numel(), device=DEVICE, dtype=torch.float64).mul(1.7).sin().reshape(y.shape).to(y.dtype)
    leaves = [u, *mixer.parameters()]  # a sum of squares would have next to no gradient: the norm fixes it
    return [y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("where", ["mask", "cu_seqlens"])
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_every_class_gives_the_same_with_kernels(name, where, monkeypatch) -> None:
    mixer = MatrixMixer(8, name, d_state=4, headdim=8, d_conv=3, max_length=20).to(DEVICE)
    draws = torch.randn(3, 2, 11, 8, device=DEVICE)
    found = []
    for impl in ("triton", "eager"):
        for f in (short_conv, gated_rms_norm):
            monkeypatch.setattr(parameters, f.__name__, lambda *a, f=f, i=impl, **k: f(*a, **k | {"impl": i}))
        found.append(trained(mixer, where, draws))
    exact = trained(mixer.double(), where, draws.double())
    for ours, eager, true in zip(*found, exact, strict=True):
        error, of_eager = ((t.double() - true).norm() for t in (ours, eager))
        assert error <= max(5e-6 * true.norm(), 2 * of_eager)
