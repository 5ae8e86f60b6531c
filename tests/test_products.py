"""Fast products: as exact as they promise, forward and backward, in linear memory, and less work than the entries."""

import math
import re
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_ssm import MATRICES, MatrixMixer
from hydra_ssm.matrices import DFT, Attention, Cauchy, Inputs, Settings, Vandermonde, _fft, vandermonde
from hydra_ssm.matrices._cosines import _interpolation, rank
from hydra_ssm.matrices._fft import fast_length
from hydra_ssm.matrices._reciprocal import SPAN, exponents_and_weights
from hydra_ssm.ops import Documents

APPROXIMATE = pytest.mark.parametrize("matrix", [Cauchy, Vandermonde])
WAYS = pytest.mark.parametrize("nodes", [10**6, 0], ids=["interpolation", "fft"])


def normal(*shape, size=1.0):
    return size * torch.randn(*shape)


def uniform(*shape, size=1.0):
    return size * (2 * torch.rand(*shape) - 1)


def make(matrix, L, draw=normal, size=1.0, c=0.5, d=3, H=2, B=1, tolerance=None, documents=None):
    """A matrix of float32 leaves, its own if there are more than two."""
    q, k = (draw(B, L, H, d, size=size).requires_grad_() for _ in "qk")
    if matrix is Cauchy:
        return Cauchy(documents, q, k, torch.tensor(float(c), requires_grad=True), 0.1, tolerance)
    return Vandermonde(documents, q, k, 0.1, tolerance)


def leaves(M):
    return [getattr(M, name) for name in ("q", "k", "c") if hasattr(M, name)]


def cast(M, dtype):
    tensors = {f.name: getattr(M, f.name) for f in fields(M)}
    moved = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(M, **moved)


def multiply(M, x, grad, dense=False):
    """The product and the gradients of x and of all that M is made of."""
    x = x.clone().requires_grad_()
    y = torch.einsum("bhij,bjhp->bihp", M.dense(), x) if dense else M @ x
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves(M)], grad)]


def errors(M, P=4):
    """Relative errors of the product and of each gradient, against the entries in float64."""
    x, grad = torch.randn(2, *M.q.shape[:3], P).to(M.q.dtype)
    found, exact = multiply(M, x, grad), multiply(cast(M, torch.float64), x.double(), grad.double(), dense=True)
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


CASES = [
    (Cauchy, {"L": 300}), (Cauchy, {"L": 300, "size": 0.1, "c": 1e-6}), (Cauchy, {"L": 64, "c": 1e4}),
    (Cauchy, {"L": 200, "draw": uniform, "size": 8, "c": 1e-6}), (Cauchy, {"L": 200, "draw": uniform, "size": 8}),
    (Cauchy, {"L": 1}), (Cauchy, {"L": 300, "size": 30}),
    (Vandermonde, {"L": 300}), (Vandermonde, {"L": 128, "size": 0.03}), (Vandermonde, {"L": 2}),
    (Vandermonde, {"L": 2048, "draw": uniform, "size": 20, "H": 1, "d": 2}),
    (Vandermonde, {"L": 300, "size": 500}),
]  # fmt: skip


@pytest.mark.parametrize(("matrix", "options"), CASES)
def test_products_and_gradients_are_right_to_ten_thousandths_by_default(matrix, options):
    assert max(errors(make(matrix, **options))) < 1e-4


@WAYS
@pytest.mark.parametrize("options", [o for m, o in CASES if m is Vandermonde])
def test_both_ways_to_the_vandermonde_product_are_right(options, nodes, monkeypatch):
    if nodes and options.get("size") == 500:
        pytest.skip("interpolation would need more nodes than tokens")
    monkeypatch.setattr(vandermonde, "MOST_NODES", nodes)
    assert max(errors(make(Vandermonde, **options))) < 1e-4
    assert max(errors(cast(make(Vandermonde, **options), torch.float64))) < 1e-11


@WAYS
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8, 1e-12])
@APPROXIMATE
def test_a_tolerance_is_kept(matrix, nodes, tolerance, monkeypatch):
    monkeypatch.setattr(vandermonde, "MOST_NODES", nodes)
    M = cast(make(matrix, 257, size=3, tolerance=tolerance), torch.float64)
    assert max(errors(M)) < tolerance


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-9])
def test_each_entry_of_a_cauchy_matrix_is_right_however_small(tolerance):
    """Denominators from 7e-4 to 6e3: the norm alone would not see the small entries."""
    M = cast(make(Cauchy, 80, uniform, size=8, c=1e-9, d=1, H=1, tolerance=tolerance), torch.float64)
    entries = (M @ torch.eye(80, dtype=torch.float64)[None, :, None])[:, :, 0]
    torch.testing.assert_close(entries, M.dense()[:, 0], rtol=tolerance, atol=0)


@pytest.mark.parametrize("tolerance", [0.1, 1e-2, 1e-4, 1e-5, 1e-8, 1e-13, 1e-15])
def test_a_reciprocal_is_a_sum_of_exponentials_over_seven_decades(tolerance):
    like = torch.zeros((), dtype=torch.float64)
    s, w = exponents_and_weights(tolerance, like)
    assert (s > 0).all()
    assert (w > 0).all()
    D = torch.logspace(0, math.log10(SPAN), 3001, dtype=torch.float64)
    terms = torch.exp(-D[:, None] * s)
    rounding = 3e-15
    assert (D * (terms @ w) - 1).abs().max() < tolerance + rounding
    assert (D**2 * (terms @ (w * s)) - 1).abs().max() < tolerance + rounding
    assert len(s) < math.log(SPAN) * math.log(8 / tolerance) / 6 + 8


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.3, 4.0, 50.0, 300.0])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-10])
def test_as_many_nodes_as_are_asked_for_interpolate_every_cosine(angle, tolerance):
    nodes = rank(angle, tolerance)
    assert nodes < 1.02 * angle + 7 * (1 + angle) ** (1 / 3) + 1.2 * math.log10(1 / tolerance) + 2
    places, E = _interpolation(1000, nodes, torch.zeros((), dtype=torch.float64))
    w = torch.linspace(0, 1, 50, dtype=torch.float64) * 2 * angle / 999
    exact = -2 * torch.sin(torch.arange(1000)[:, None] * w / 2) ** 2
    found = E @ (-2 * torch.sin(places[:, None] * w / 2) ** 2)
    assert (found - exact).abs().max() <= tolerance * min(1, angle**2) + 1e-13 * angle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@APPROXIMATE
def test_half_precision_loses_no_more_than_through_the_entries(matrix, dtype):
    for size in (0.3, 3):
        M = make(matrix, 200, size=size)
        x, grad = torch.randn(2, 1, 200, 2, 8)
        half = cast(M, dtype)
        exact = multiply(cast(half, torch.float64), x.to(dtype).double(), grad.to(dtype).double(), dense=True)
        fast, dense = (multiply(half, x.to(dtype), grad.to(dtype), dense=way) for way in (False, True))
        assert fast[0].dtype == dtype
        for f, d, e in zip(fast, dense, exact, strict=True):
            assert f.dtype == d.dtype
            luck = torch.finfo(dtype).eps if f.ndim == 0 else 1e-4  # a single number may be right by chance
            assert (f.double() - e).norm() <= 2 * (d.double() - e).norm() + luck * e.norm()


def test_sums_over_tokens_may_leave_the_range_of_float16():
    """Values and gradients of one sign, whose products are in it."""
    q, k, x = torch.randn(1, 512, 2, 3), torch.randn(1, 512, 2, 3), 1e4 * torch.rand(1, 512, 2, 4)
    M = cast(Cauchy(None, q, k, torch.tensor(0.5), 1e-6), torch.float16)
    grad = torch.full_like(x, 100)
    exact = multiply(cast(M, torch.float64), x.half().double(), grad.double(), dense=True)
    found = multiply(M, x.half(), grad.half())
    for f, e in zip(found[:4], exact[:4], strict=True):  # all but c's gradient, which is a sum of everything
        assert e.abs().max() < torch.finfo(torch.float16).max
        assert (f.double() - e).norm() < 2e-3 * e.norm()


@WAYS
@APPROXIMATE
def test_padding_of_any_finite_value_has_no_influence(matrix, nodes, monkeypatch):
    monkeypatch.setattr(vandermonde, "MOST_NODES", nodes)
    tokens = torch.arange(60) < 41
    full = make(matrix, 60, c=1e-9, documents=Documents(torch.where(tokens, 0, -1)[None]))
    with torch.no_grad():
        full.q[:, ~tokens], full.k[:, ~tokens] = 11.0, -60.0
        full.q[:, 50:] = -60.0  # denominators that are far below those of the tokens
    short = replace(full, documents=None, q=full.q[:, tokens], k=full.k[:, tokens])
    x, grad = torch.randn(2, 1, 60, 2, 4)
    found = multiply(full, x, grad)
    y = short @ x[:, tokens]
    expected = torch.autograd.grad(y, leaves(full), grad[:, tokens])
    torch.testing.assert_close(found[0][:, tokens], y, rtol=1e-4, atol=1e-5)
    assert found[0][:, ~tokens].abs().max() == 0
    assert found[1][:, ~tokens].abs().max() == 0
    for f, e in zip(found[2:], expected, strict=True):
        assert (f - e).norm() < 1e-4 * e.norm()


@pytest.mark.parametrize("size", [1e5, 1e20, 1e35])
def test_nodes_are_not_counted_for_angles_that_need_too_many(size, monkeypatch):
    """Of a model that diverges: one by one up to 1e20, that would take for ever."""
    counted = []
    monkeypatch.setattr(vandermonde, "rank", lambda angle, tolerance: counted.append(angle) or 10**6)
    y = make(Vandermonde, 20, size=size) @ torch.randn(1, 20, 2, 3)
    assert y.isfinite().all()
    assert not counted


def test_c_may_be_negative_where_no_denominator_is():
    assert max(errors(make(Cauchy, 50, size=0.2, c=-0.3))) < 1e-4
    y = make(Cauchy, 50, c=-5) @ torch.randn(1, 50, 2, 3)
    assert y.isnan().all()


@pytest.mark.parametrize("name", ["cauchy", "vandermonde"])
def test_a_mixer_takes_a_tolerance(name):
    u = torch.randn(1, 40, 16, dtype=torch.float64)
    layer = MatrixMixer(16, name, headdim=8, d_state=4, dtype=torch.float64, max_length=40)
    loose = MatrixMixer(16, name, headdim=8, d_state=4, dtype=torch.float64, max_length=40, tolerance=1e-3)
    with torch.no_grad():
        layer.in_proj.weight.mul_(20)
    loose.load_state_dict(layer.state_dict())
    difference = (loose(u) - layer(u)).norm() / layer(u).norm()
    assert 1e-13 < difference < 1e-3
    with pytest.raises(ValueError, match=r"tolerance must be between 1e-15 and 0.1, got 0"):
        MatrixMixer(16, name, headdim=8, tolerance=0.0)


class Work(TorchDispatchMode):
    """Counts the numbers that operations make, all together and the most that one makes."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.total += t.numel()
                self.largest = max(self.largest, t.numel())
        return made


def work(name, L, max_length, size=1.0):
    """Of the product and its gradients at length L."""
    settings = Settings(nheads=2, headdim=16, d_state=8, max_length=max_length)
    matrix = MATRICES[name]
    features = {f.name: (size * torch.randn(1, L, *f.shape)).requires_grad_() for f in matrix.features(settings)}
    parameters = {n: p.requires_grad_() for n, p in matrix.parameters(settings).items()}
    x = torch.randn(1, L, 2, 16, requires_grad=True)
    with Work() as counted:
        y = matrix.build(Inputs(x, features, parameters, settings, None)) @ x
        y.backward(torch.ones_like(y))
    return counted


STRUCTURED = sorted({*MATRICES} - {"dense"})


@pytest.mark.parametrize("name", STRUCTURED)
def test_memory_is_linear_in_the_length(name):
    """Dense alone may hold a matrix."""
    short, long = work(name, 1024, 1024), work(name, 4096, 4096)
    bound = 8.5 if name == "butterfly" else 4.5  # L^1.5 parameters
    assert long.largest < bound * short.largest
    assert long.largest < 4096 * 4096 / 4


@pytest.mark.parametrize("name", [name for name in STRUCTURED if name not in ("attention", "butterfly", "vandermonde")])
def test_the_numbers_that_are_computed_grow_as_the_length(name):
    """Those of all operations but what goes on inside a matrix product, a transform or a scan."""
    L = 4096 if name == "cauchy" else 1024  # shorter, its factors are kept in the backward pass
    assert work(name, 4 * L, 4 * L).total < 4.6 * work(name, L, L).total


def test_the_work_of_vandermonde_grows_as_the_length_whatever_the_angles():
    """By interpolation it would grow as the square, but with a factor so small that it is faster for a while."""
    assert work("vandermonde", 4096, 4096).total < work("vandermonde", 4096, 4096, size=100).total
    assert work("vandermonde", 4096, 4096, size=100).total < 4.6 * work("vandermonde", 1024, 1024, size=100).total


def test_a_short_sequence_costs_a_butterfly_little():
    assert work("butterfly", 64, 4096).largest <= 2 * 64**3  # the gradient of a factor
    assert work("butterfly", 1024, 1024).total < work("butterfly", 1024, 4096).total < 2**23


def test_transforms_are_of_fast_lengths():
    for n in (1, 2, 7, 11, 13, 1021, 2047, 4099):
        found = fast_length(n)
        assert n <= found <= 1.2 * n + 1
        for prime in (2, 3, 5):
            while found % prime == 0:
                found //= prime
        assert found == 1


def test_a_long_transform_takes_its_heads_in_parts(monkeypatch):
    """What it needs beside x is bounded; the product and its gradient are those of the entries."""
    from hydra_ssm.matrices import dft

    called = []
    monkeypatch.setattr(_fft, "SHORT", 0)
    of_torch = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, **given: called.append(x.shape[2]) or of_torch(x, **given))
    monkeypatch.setattr(dft, "AT_ONCE", 2 * 40 * 3 * 2)
    x = torch.randn(2, 37, 5, 3, dtype=torch.float64, requires_grad=True)
    M, grad = DFT(None, 40, x), torch.randn(2, 37, 5, 3, dtype=torch.float64)
    found, wanted = M @ x, torch.einsum("bhij,bjhp->bihp", M.dense(), x)
    assert called == [2, 2, 1]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad))


def whole(name, L, leaf=None, B=3, max_length=48):
    """A matrix, what it and x are made of as leaves, and x. The fixed form expands its tables."""
    kind, _, fixed = name.partition("-")
    leaf = leaf or (lambda *shape: torch.randn(*shape, dtype=torch.float64))
    settings = Settings(nheads=2, headdim=5, d_state=1, max_length=max_length)
    x = leaf(B, L, 2, 5).requires_grad_()
    own = {f.name: leaf(*(() if fixed else (B,)), L, *f.shape) for f in MATRICES[kind].features(settings)}
    own = {name: t.requires_grad_() for name, t in own.items()}
    features = {name: t.expand(B, -1, -1) if fixed else t for name, t in own.items()}
    return MATRICES[kind].build(Inputs(x, features, {}, settings, None)), [x, *own.values()], x


TRANSFORMS = pytest.mark.parametrize("name", ["toeplitz", "toeplitz-fixed", "dft"])
BOTH = pytest.mark.parametrize("short", [0, 64], ids=["transforms", "entries"])


@BOTH
@TRANSFORMS
@pytest.mark.parametrize("L", [1, 2, 3, 31, 32, 48])
def test_short_and_long_ways_are_exact_with_every_gradient(name, L, short, monkeypatch):
    monkeypatch.setattr(_fft, "SHORT", short)
    M, leaves, x = whole(name, L)
    fast, exact = M @ x, torch.einsum("bhij,bjhp->bihp", M.dense(), x)
    assert ("Fft" in trace(fast)) == (short == 0)
    torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-13)
    grad = torch.randn_like(exact)
    found, wanted = (torch.autograd.grad(y, leaves, grad) for y in (fast, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def trace(y):
    """The names of the operations that y's gradient goes through."""
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    return " ".join(names)


@TRANSFORMS
def test_the_way_changes_after_the_last_short_length(name):
    for length, way in ((_fft.SHORT, "Bmm"), (_fft.SHORT + 1, "Fft")):
        M, _, x = whole(name, length, max_length=_fft.SHORT + 1)
        assert way in trace(M @ x)
    assert _fft.SHORT == 256  # as the documentation says


@TRANSFORMS
def test_gradients_of_short_products_come_through_no_index(name):
    """Adding up by index goes one by one, in an order that a GPU does not keep: here the same bits each time."""
    M, leaves, x = whole(name, 128, lambda *shape: torch.randn(*shape), max_length=128)
    y, grad = M @ x, torch.randn(3, 128, 2, 5)
    assert not {"Index", "Gather", "Scatter", "Fold"} & set(re.findall("[A-Z][a-z]+", trace(y)))
    first, second = (torch.autograd.grad(M @ x, leaves, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@TRANSFORMS
def test_short_products_in_half_precision_lose_no_more_than_through_the_entries(name, dtype):
    M, leaves, x = whole(name, 100, lambda *shape: torch.randn(*shape).to(dtype), max_length=100)
    grad = torch.randn(3, 100, 2, 5).to(dtype)
    fast, dense = M @ x, torch.einsum("bhij,bjhp->bihp", M.dense(), x)
    assert fast.dtype == dtype
    wide, exact_leaves, exact_x = whole(name, 100, of_list([t.detach().double() for t in leaves]), max_length=100)
    exact = torch.einsum("bhij,bjhp->bihp", wide.dense(), exact_x)
    results = [
        [y, *torch.autograd.grad(y, own, grad.to(y.dtype))]
        for y, own in ((fast, leaves), (dense, leaves), (exact, exact_leaves))
    ]
    for f, d, e in zip(*results, strict=True):
        assert f.dtype == d.dtype
        assert (f.double() - e).norm() <= 2 * (d.double() - e).norm() + 1e-4 * e.norm()


def of_list(tensors):
    """Gives these, one by one."""
    left = iter(tensors)
    return lambda *shape: next(left)


@pytest.mark.slow
@TRANSFORMS
def test_a_compiled_short_product_is_right(name):
    torch.compiler.reset()
    M, leaves, x = whole(name, 24)
    grad = torch.randn_like(x)
    wanted = M @ x

    def product(*own):
        tables = [t.expand(3, -1, -1) if name.endswith("fixed") else t for t in own[1:]]
        changed = {"t_causal": tables[0], "t_anticausal": tables[1]} if tables else {}
        return replace(M, **changed) @ own[0]

    found = torch.compile(product, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, grad) for y in (found, wanted)))


def test_a_program_for_any_length_has_transforms():
    """An export of a dynamic length: what is chosen by the length would hold the program to short ones."""

    class Layer(torch.nn.Module):
        def forward(self, x):
            return DFT(None, 512, x) @ x

    x = torch.randn(1, 40, 2, 3)
    length = torch.export.Dim("length", min=2, max=400)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({1: length},))
    for L in (7, 300):
        x = torch.randn(1, L, 2, 3)
        torch.testing.assert_close(program.module()(x), DFT(None, 512, x) @ x, rtol=1e-4, atol=1e-5)


def test_vandermonde_asks_for_no_value_where_there_is_none():
    """Tracers that do not say so (torch 2.11, of `M @ x`) are known by their tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = torch.randn(2, 1, 130, 2, 3)
        assert (Vandermonde(None, q, k, 0.1) @ torch.randn(1, 130, 2, 4)).shape == (1, 130, 2, 4)


@pytest.mark.slow
@APPROXIMATE
def test_a_compiled_product_is_right(matrix):
    torch.compiler.reset()
    M = make(matrix, 130, size=2)

    def product(q, k, x):
        return replace(M, q=q, k=k) @ x

    x, grad = torch.randn(2, 1, 130, 2, 4)
    given = [*leaves(M)[:2], x.requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in given]
    wide = replace(cast(M, torch.float64), q=exact[0], k=exact[1])
    wanted = torch.einsum("bhij,bjhp->bihp", wide.dense(), exact[2])
    found = torch.compile(product, fullgraph=True, backend="aot_eager")(*given)
    pairs = [(found, wanted)]
    pairs += zip(
        torch.autograd.grad(found, given, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    )
    for f, e in pairs:
        assert (f.double() - e).norm() < 1e-4 * e.norm()


@pytest.mark.gpu
@APPROXIMATE
def test_on_a_gpu_products_are_right_and_faster_than_through_the_entries(matrix):
    from hydra_ssm.bench.clock import on_gpu

    settings = Settings(nheads=4, headdim=64, d_state=16, max_length=1024)
    M = make(matrix, 1024, d=16, H=4, B=2)
    there = replace(M, **{n: getattr(M, n).detach().cuda().requires_grad_() for n in ("q", "k")})
    if matrix is Cauchy:
        there = replace(there, c=M.c.detach().cuda().requires_grad_())
    x, grad = torch.randn(2, 2, 1024, 4, settings.headdim)
    exact = multiply(cast(M, torch.float64), x.double(), grad.double(), dense=True)
    for f, e in zip(multiply(there, x.cuda(), grad.cuda()), exact, strict=True):
        assert (f.cpu().double() - e).norm() < 1e-4 * e.norm()
    device = torch.device("cuda")
    fast, dense = (min(on_gpu(lambda w=w: multiply(there, x.cuda(), grad.cuda(), dense=w), device)) for w in (0, 1))
    assert fast < dense


@pytest.mark.gpu
@APPROXIMATE
def test_a_cuda_graph_captures_a_product_and_its_gradients(matrix):
    from hydra_ssm.bench.clock import captured

    M = cast(make(matrix, 130, size=2), torch.float32)
    there = replace(M, **{n: getattr(M, n).detach().cuda().requires_grad_() for n in ("q", "k", "c") if hasattr(M, n)})
    x, grad = torch.randn(2, 1, 130, 2, 4).cuda()
    kept = []

    def run():
        kept[:] = multiply(there, x, grad)

    replay = captured(run, torch.device("cuda"))
    for t in kept:
        t.zero_()
    replay()
    exact = multiply(cast(M, torch.float64), x.cpu().double(), grad.cpu().double(), dense=True)
    for f, e in zip(kept, exact, strict=True):
        assert (f.cpu().double() - e).norm() < 1e-4 * e.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_packed_documents_needs_no_matrix_on_a_gpu(dtype):
    offsets = torch.tensor([0, 1, 900, 901, 4000, 7000], device="cuda")
    ids = torch.repeat_interleave(torch.arange(5, device="cuda"), offsets.diff())
    ids = torch.cat([ids, ids.new_full((100,), -1)])[None]
    q, k, x = (torch.randn(1, 7100, 2, 32, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    documents = Documents(ids, offsets)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = Attention(documents, q, k) @ x
    grads = torch.autograd.grad(found.float().square().sum(), [q, k, x])
    assert torch.cuda.max_memory_allocated() - before < 7100 * 7100
    exact = [t.detach().double().requires_grad_() for t in (q, k, x)]
    M = Attention(documents, *exact[:2]).dense()
    wanted = torch.einsum("bhij,bjhp->bihp", M, exact[2])
    expected = torch.autograd.grad(wanted.square().sum(), exact)
    close = 1e-4 if dtype == torch.float32 else 2e-2
    for f, e in zip((found, *grads), (wanted, *expected), strict=True):
        assert (f.double() - e).norm() < close * e.norm()


def test_features_of_vandermonde_that_vanish_give_nothing():
    for tiny in (0.0, 1e-300, 1e-165, 1e-40):
        q = torch.zeros(1, 5, 1, 1, dtype=torch.float64)
        q[0, 2] = tiny
        M = MATRICES["vandermonde"](None, q, q, 1.0)
        x = torch.ones(1, 5, 1, 1, dtype=torch.float64)
        torch.testing.assert_close(M @ x, torch.einsum("bhij,bjhp->bihp", M.dense(), x))
