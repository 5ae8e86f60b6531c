"""Every matrix class has the entries the paper gives it, and a product that equals them, values and gradients.

FORMULAS holds one row a class: the entry, written from the paper. A class without a row fails.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hydra_ssm.matrices import MATRICES, Inputs, Settings
from hydra_ssm.ops import Documents

SETTINGS = Settings(nheads=2, headdim=3, d_state=4, max_length=23)
L, LMAX, d = 11, 23, 4
TURN = 2 * math.pi * 1e-3


def decay(t, way, h, *between):
    """exp of the sum of a = dt A over tokens, for one direction."""
    return math.exp(sum(t.dt[way][k, h] * -math.exp(t.A_log[h]) for k in between))


def read(t, way, h, i, j, *between, B=None, C=None):
    """dt_j (C_i . B_j) times the decay between."""
    B, C = (getattr(t, f"{n}_{way}") if f"{n}_{way}" in vars(t) else getattr(t, n) for n in "BC")
    return t.dt[way][j, h] * (C[i, 0] @ B[j, 0]) * decay(t, way, h, *between)


def diagonal(t, h, i):
    return t.D[h] + getattr(t, "fc_D.weight")[h] @ t.x[i].flatten()


def causal(t, h, i, j):
    return read(t, "causal", h, i, j, *range(j + 1, i + 1)) if i >= j else 0


def both(t, h, i, j):
    return causal(t, h, i, j) + (read(t, "anticausal", h, i, j, *range(i, j)) if i <= j else 0)


def shifted(t, h, i, j):
    if i > j:
        return read(t, "causal", h, i - 1, j, *range(j + 1, i))
    return read(t, "anticausal", h, i + 1, j, *range(i + 1, j)) if i < j else 0


def quasiseparable(t, h, i, j):
    return diagonal(t, h, i) if i == j else shifted(t, h, i, j)


def concat(t, h, i, j):
    if h == 0:
        return causal(t, 0, i, j)
    own = SimpleNamespace(**vars(t) | {"A_log": t.A_log[1:]})
    return read(own, "anticausal", 0, i, j, *range(i, j)) if i <= j else 0


def attention(t, h, i, j):
    scores = (t.k[:, h] @ t.q[i, h] / math.sqrt(d)).exp()
    return scores[j] / scores.sum()


def butterfly(t, h, i, j):
    m = 5  # the square root of 23, rounded up
    return t.left[h, i % m, i // m, j // m] * t.right[h, j // m, i % m, j % m]


FORMULAS = {
    "dense": lambda t, h, i, j: t.M[h, i, j] / math.sqrt(LMAX),
    "attention": attention,
    "low_rank": lambda t, h, i, j: t.q[i, h] @ t.k[j, h] / math.sqrt(LMAX * d),
    "butterfly": butterfly,
    "toeplitz": lambda t, h, i, j: (t.t_causal[i - j, h] if i >= j else t.t_anticausal[j - i, h]) / 2 / math.sqrt(LMAX),
    "dft": lambda t, h, i, j: math.cos(2 * math.pi * i * j / LMAX) / math.sqrt(LMAX),
    "vandermonde": lambda t, h, i, j: (
        ((TURN * t.q[i, h] * j).cos().sum() - (TURN * t.k[j, h] * i).cos().sum()) / math.sqrt(2 * LMAX * d)
    ),
    "cauchy": lambda t, h, i, j: (1 / (t.q[i, h].exp() + t.k[j, h].exp() + 2 * t.c + 1e-8)).sum() / math.sqrt(LMAX * d),
    "semiseparable": causal,
    "quasiseparable": quasiseparable,
    "quasiseparable_shared": quasiseparable,
    "add": both,
    "add_diagonal": lambda t, h, i, j: both(t, h, i, j) + (diagonal(t, h, i) if i == j else 0),
    "add_shift": shifted,
    "concat": concat,
}
NAMES = sorted(FORMULAS)


def inputs(name, batch=1, length=L, documents=None):
    """Random features and parameters of a class, all of them leaves."""
    matrix = MATRICES[name]
    features = {f.name: leaf(batch, length, *f.shape) for f in matrix.features(SETTINGS)}
    parameters = {n: p.double().requires_grad_() for n, p in matrix.parameters(SETTINGS).items()}
    x = leaf(batch, length, SETTINGS.nheads, SETTINGS.headdim)
    return Inputs(x, features, parameters, SETTINGS, documents)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def test_every_class_with_a_matrix_has_a_formula():
    assert {*MATRICES} - {*FORMULAS} == {"mult"}


@pytest.mark.parametrize("name", NAMES)
def test_entries_equal_the_formula(name):
    given = inputs(name)
    t = SimpleNamespace(**{n: v[0].detach() for n, v in given.features.items()}, x=given.x[0].detach())
    vars(t).update({n: v.detach() for n, v in given.parameters.items()})
    if hasattr(t, "dt_bias"):
        bias = t.dt_bias.chunk(2) if name == "concat" else (t.dt_bias, t.dt_bias)
        ways = zip(("causal", "anticausal"), bias, strict=True)
        t.dt = {way: F.softplus(vars(t)[f"dt_{way}"] + b) for way, b in ways if f"dt_{way}" in vars(t)}
    entries = [[[float(FORMULAS[name](t, h, i, j)) for j in range(L)] for i in range(L)] for h in range(2)]
    M = MATRICES[name].build(given).dense()
    torch.testing.assert_close(M[0], torch.tensor(entries, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 13, 23])
@pytest.mark.parametrize("name", NAMES)
def test_product_equals_dense_with_every_gradient(name, length):
    given = inputs(name, batch=2, length=length)
    leaves = {**given.features, **given.parameters, "x": given.x}
    x = leaf(2, length, SETTINGS.nheads, SETTINGS.headdim)
    fast = MATRICES[name].build(given) @ x
    exact = torch.einsum("bhij,bjhp->bihp", MATRICES[name].build(given).dense(), x)
    grad = torch.randn_like(exact)
    torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-13)
    wanted = [*leaves.values(), x]
    of = lambda y: torch.autograd.grad(y + 0 * x, wanted, grad, allow_unused=True, materialize_grads=True)  # noqa: E731
    torch.testing.assert_close(of(fast), of(exact), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_padding_rows_and_columns_are_zero_and_the_rest_is_the_matrix_of_the_shorter_sequence(name):
    full = inputs(name)
    documents = Documents(torch.where(torch.arange(L) < 7, 0, -1)[None])
    short = Inputs(full.x[:, :7], {n: v[:, :7] for n, v in full.features.items()}, full.parameters, SETTINGS, None)
    M = MATRICES[name].build(replace(full, documents=documents)).dense()
    torch.testing.assert_close(M[:, :, :7, :7], MATRICES[name].build(short).dense(), rtol=1e-12, atol=1e-13)
    assert M[:, :, 7:].abs().max() == 0
    assert M[..., 7:].abs().max() == 0


def test_mult_is_the_product_of_two_scans_and_says_that_it_has_no_matrix():
    given = inputs("mult")
    mult = MATRICES["mult"].build(given)
    first, second = (replace(mult, triangles=(t,)) for t in mult.triangles)
    torch.testing.assert_close(mult @ given.x, (first @ given.x) * (second @ given.x))
    with pytest.raises(TypeError, match="mult is quadratic in x"):
        mult.dense()


@pytest.mark.parametrize("name", ["cauchy", "vandermonde"])
def test_entries_hold_no_matrix_for_each_feature(name):
    """The graph of the gradient keeps less than one (B, H, L, L), where a term for each feature would keep several."""
    given = inputs(name, length=23)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        MATRICES[name].build(given).dense()
    assert max(saved) < 23 * 23
