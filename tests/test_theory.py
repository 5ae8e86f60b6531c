"""docs/theory.md, statement by statement: what it says holds, in float64, to 1e-12."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hydra_ssm import MATRICES, MatrixMixer
from hydra_ssm.inspection import alignment, promise, rank
from hydra_ssm.matrices import (
    Add,
    AddDiagonal,
    Inputs,
    LowRank,
    Quasiseparable,
    Semiseparable,
    Settings,
)
from hydra_ssm.ops import Triangle
from hydra_ssm.ops.reference import entries

PAGE = Path(__file__).parent.parent / "docs" / "theory.md"
L, N, H = 13, 3, 2
SETTINGS = Settings(nheads=H, headdim=2, d_state=N, max_length=L)


def some(matrix, settings=SETTINGS, length=L):
    """A matrix of a class with random features and parameters, as a value, and its entries (H, L, L)."""
    given = Inputs(
        torch.randn(1, length, settings.nheads, settings.headdim, dtype=torch.float64),
        {f.name: torch.randn(1, length, *f.shape, dtype=torch.float64) for f in matrix.features(settings)},
        {n: p.double() for n, p in matrix.parameters(settings).items()},
        settings,
        None,
    )
    M = matrix.build(given)
    return M, M.dense()[0]


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def per_head(t):
    """B or C (1, L, G, N) of groups as (1, L, H, N) of heads."""
    return t.repeat_interleave(H // t.shape[2], dim=2)


def quasiseparable(causal, anticausal, diagonal):
    """A value of the class from its two strict triangles and diagonal (1, L, H)."""
    assert causal.strict
    assert anticausal.strict
    assert anticausal.upper > causal.upper
    return Quasiseparable(None, (causal, anticausal), diagonal)


# ------------------------------------------------------------------------------------------------- 2.1 and 2.2: mixers


@pytest.mark.parametrize("name", [name for name in MATRICES if name != "mult"])
def test_2_1_every_class_mixes_the_preprocessed_input_by_one_matrix_a_head(name):
    mixer = MatrixMixer(12, name, d_state=N, headdim=6, max_length=L).double()
    X = torch.randn(1, L, 12, dtype=torch.float64)
    M = mixer.matrix(X).dense()
    z, given = mixer._inputs(mixer.in_proj(X), None)
    slices = [M[0, h] @ given.x[0, :, h] for h in range(4)]  # Y^h = M^h f_X(X)^h
    Y = torch.stack(slices, dim=1)[None] + (given.x if mixer.matrix_class.skip else 0)
    equal(mixer.out_proj(mixer.norm(Y.flatten(2), z, None)), mixer(X))


@pytest.mark.parametrize(
    "name", [name for name, matrix in MATRICES.items() if matrix.data_dependent and name != "mult"]
)
def test_2_2_blocks_depend_on_their_own_tokens_alone(name):
    """With the two readings that the page names: leading blocks, and rows before they are normalised."""
    expected = {"toeplitz": "leading blocks", "attention": "up to row factors"}.get(name, "aligned")
    assert alignment(name).kind == expected


@pytest.mark.parametrize(
    "name", [name for name, matrix in MATRICES.items() if matrix.data_dependent and name != "mult"]
)
def test_2_2_what_is_aligned_extends_a_longer_sequence_only_adds_rows_and_columns(name):
    matrix = MATRICES[name]
    features = {f.name: torch.randn(1, L, *f.shape, dtype=torch.float64) for f in matrix.features(SETTINGS)}
    x = torch.randn(1, L, H, 2, dtype=torch.float64)
    parameters = {n: p.double() for n, p in matrix.parameters(SETTINGS).items()}

    def of_the_first(n):
        own = {name: value[:, :n] for name, value in features.items()}
        M = matrix.build(Inputs(x[:, :n], own, parameters, SETTINGS, None)).dense()[0]
        return M / M.diagonal(dim1=1, dim2=2)[..., None] if name == "attention" else M

    equal(of_the_first(8), of_the_first(L)[:, :8, :8])


def free_numbers(name, length):
    """In how many independent ways the first rows and columns of a matrix can change."""
    matrix = MATRICES[name]
    settings = Settings(nheads=1, headdim=1, d_state=1, max_length=64)
    x = torch.randn(1, length, 1, 1, dtype=torch.float64)
    features = {f.name: torch.randn(1, length, *f.shape, dtype=torch.float64) for f in matrix.features(settings)}
    parameters = {n: p.double() for n, p in matrix.parameters(settings).items()}
    names, values = zip(*(features | parameters | {"x": x}).items(), strict=True)

    def flat(*values):
        found = dict(zip(names, values, strict=True))
        own = {n: found[n] for n in features}
        return (
            matrix.build(Inputs(found["x"], own, {n: found[n] for n in parameters}, settings, None)).dense().flatten()
        )

    jacobian = torch.autograd.functional.jacobian(flat, values)
    return int(torch.linalg.matrix_rank(torch.cat([part.reshape(length**2, -1) for part in jacobian], dim=1)))


@pytest.mark.parametrize("name", ["dense", "butterfly"])
def test_2_2_a_matrix_that_cannot_be_dealt_out_has_more_free_numbers_than_any_deal_gives_its_tokens(name):
    assert [free_numbers(name, n) for n in (2, 4, 8)] == [4, 16, 64]


@pytest.mark.parametrize("name", ["low_rank", "toeplitz", "quasiseparable", "attention"])
def test_2_2_aligned_classes_have_a_few_for_each_token(name):
    for n in (8, 16):
        assert free_numbers(name, n) <= 5 * n < n**2


# ------------------------------------------------------------------------------------------- 3.1 and 3.2: rank and SSM


def test_3_1_blocks_of_a_semiseparable_matrix_that_reach_the_diagonal_have_rank_n():
    _, M = some(Semiseparable)
    found = rank(M, diagonal=True)
    assert found.below.tolist() == [N, N]
    assert M.triu(1).abs().max() == 0
    assert found.whole.tolist() == [L, L]
    assert promise(Semiseparable, N).below == N


def of_scan(c, b, A):
    """M_ij = c_i . A_i ... A_{j+1} b_j for i >= j, the state one step at a time; A[0] is not used."""
    M = torch.zeros(L, L, dtype=torch.float64)
    for j in range(L):
        state = b[j]
        for i in range(j, L):
            state = state if i == j else A[i] @ state
            M[i, j] = c[i] @ state
    return M


def test_3_1_a_triangle_of_such_blocks_is_a_state_space_model():
    """The other way round, from the ranks alone: c, b and the transition matrices A come out of the blocks."""
    c, b, A = (torch.randn(L, *shape, dtype=torch.float64) for shape in [(N,), (N,), (N, N)])
    M = of_scan(c, b, A)
    assert int(rank(M, diagonal=True).below) == N
    # U[k] spans the columns of the corner M[k:, :k + 1]. Without its first row it spans all but the last column of the
    # next corner, and lies in the span of U[k + 1].
    bases = [torch.linalg.svd(M[k:, : k + 1], full_matrices=False) for k in range(L)]
    U = [u[:, s > 1e-9 * s[0]] for u, s, _ in bases]
    c = [u[0] for u in U]
    b = [u.T @ M[k:, k] for k, u in enumerate(U)]
    A = [None, *(U[k].T @ U[k - 1][1:] for k in range(1, L))]
    torch.testing.assert_close(of_scan(c, b, A), M, rtol=1e-12, atol=1e-12 * float(M.abs().max()))
    assert max(len(state) for state in b) == N


def test_3_2_blocks_off_the_diagonal_of_a_quasiseparable_matrix_have_rank_n():
    _, M = some(Quasiseparable)
    strict, reaching = rank(M), rank(M, diagonal=True)
    assert strict.below.tolist() == strict.above.tolist() == [N, N]
    assert strict.whole.tolist() == [L, L]
    assert min(reaching.below.tolist() + reaching.above.tolist()) > N  # the diagonal is free
    assert promise(Quasiseparable, N) == (N, N, None)


def test_3_2_the_three_parts_of_a_quasiseparable_matrix_are_two_shifted_scans_and_a_diagonal():
    M, dense = some(Quasiseparable)
    x = torch.randn(1, L, H, 2, dtype=torch.float64)

    def scan(t, x):
        """The semiseparable product of a triangle's parameters, not shifted."""
        own = Semiseparable(None, (Triangle(t.dt, t.A, t.B, t.C),), None)
        return own @ x

    def shift(y):
        return F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1]

    causal, back = M.triangles
    flipped = Triangle(*(v.flip(1) if v.ndim > 1 else v for v in (back.dt, back.A, back.B, back.C)))
    y = shift(scan(causal, x)) + shift(scan(flipped, x.flip(1))).flip(1) + M.diagonal[..., None] * x
    equal(y, torch.einsum("hij,bjhp->bihp", dense, x))


# ---------------------------------------------------------------------------------------- 3.3 to 3.5: what it holds


def product_of(q, k, diagonal):
    """The quasiseparable matrix with q_i . k_j off the diagonal; q and k are (1, L, H, N), any N.

    Steps dt > 0 and rates A < 0 are such as a layer can have; B and C undo the decays.
    """
    dt = torch.full((1, L, q.shape[2]), 0.5, dtype=torch.float64)
    A = -torch.linspace(0.1, 0.3, q.shape[2], dtype=torch.float64)
    after = (dt * A).cumsum(1)[..., None]  # s_i, the sum of a up to i
    before = after - (dt * A)[..., None]
    B = k / dt[..., None]
    # Below: dt_j (C_{i-1} . B_j) exp(s_{i-1} - s_j).  Above: dt_j (C_{i+1} . B_j) exp(s_{j-1} - s_i).
    causal = Triangle(dt, A, B * after.exp(), q.roll(-1, 1) * (-after).exp(), strict=True)
    back = Triangle(dt, A, B * (-before).exp(), (q * after.exp()).roll(1, 1), upper=True, strict=True)
    return quasiseparable(causal, back, diagonal)


def test_3_3_a_low_rank_matrix_is_a_quasiseparable_one():
    M, dense = some(LowRank)
    q, k = M.q * M.scale, M.k
    equal(product_of(q, k, (q * k).sum(-1)).dense()[0], dense)
    assert rank(dense).whole.tolist() == [N, N]
    assert promise(Quasiseparable, N).below == promise(LowRank, N).whole


def test_3_3_not_every_quasiseparable_matrix_has_low_rank():
    _, M = some(Quasiseparable)
    assert rank(M).whole.min() > N


def as_strict(t):
    """A triangle without its diagonal, as the shifted triangle of the same order: C_{i-1} takes over row i's decay."""
    C = per_head(t.C) * t.log_decay.exp()[..., None]
    return Triangle(t.dt, t.A, per_head(t.B), C.roll(1 if t.upper else -1, 1), upper=t.upper, strict=True)


def diagonal_of(t):
    return entries(t, None).diagonal(dim1=-2, dim2=-1).mT


def nothing(t):
    """The other triangle of the same order, with no entries."""
    return Triangle(t.dt, t.A, per_head(t.B), torch.zeros_like(per_head(t.C)), upper=not t.upper, strict=True)


def test_3_4_a_semiseparable_matrix_is_a_quasiseparable_one():
    M, dense = some(Semiseparable)
    (t,) = M.triangles
    Q = quasiseparable(as_strict(t), nothing(t), diagonal_of(t))
    equal(Q.dense()[0], dense)
    assert dense.abs().max() > 1e-3


def test_3_4_quasiseparable_matrices_read_both_ways_and_semiseparable_ones_do_not():
    _, M = some(Quasiseparable)
    assert M.triu(1).abs().max() > 1e-3
    assert promise(Semiseparable, N).above == 0


def test_3_5_the_sum_of_two_scans_is_a_quasiseparable_matrix():
    M, dense = some(Add)
    causal, back = M.triangles
    Q = quasiseparable(as_strict(causal), as_strict(back), diagonal_of(causal) + diagonal_of(back))
    equal(Q.dense()[0], dense)


def forced(M, order):
    """The diagonal k = order, ..., L - 1 - order of the only sum of two scans that agrees with M off the diagonal.

    In a scan the block of rows k to k + order and columns k - order to k has rank `order`, so its determinant is zero.
    All its entries but that at (k, k) lie below the diagonal. Where the block without row and column k is regular, they
    fix it.
    """

    def corner(lower, k):
        rows, columns = slice(k + 1, k + 1 + order), slice(k - order, k)
        return lower[k, columns] @ torch.linalg.solve(lower[rows, columns], lower[rows, k])

    return torch.stack([corner(M, k) + corner(M.mT, k) for k in range(order, len(M) - order)])


def well_conditioned(order):
    """A sum of two scans whose blocks are far from singular, so that `forced` keeps its digits."""
    settings = Settings(nheads=1, headdim=1, d_state=order, dt_min=1.0, dt_max=1.0, A_init_range=(0.1, 0.1))
    best, found = 0.0, None
    for _ in range(20):
        _, M = some(Add, settings)
        blocks = [
            part[k + 1 : k + 1 + order, k - order : k] for part in (M[0], M[0].mT) for k in range(order, L - order)
        ]
        worst = min(float(1 / torch.linalg.cond(block)) for block in blocks)
        if worst > best:
            best, found = worst, M[0]
    return found


@pytest.mark.parametrize("order", [1, 2])
def test_3_5_the_entries_off_the_diagonal_of_a_sum_of_scans_fix_its_diagonal(order):
    M = well_conditioned(order)
    torch.testing.assert_close(forced(M, order), M.diagonal()[order:-order], rtol=1e-10, atol=1e-12)


def test_3_5_some_quasiseparable_matrices_have_a_diagonal_that_no_sum_of_scans_can_have():
    """All ones off the diagonal: a scan of order 1 goes on with ones on it, their sum has 2 there. Ours has 7."""
    ones = torch.ones(1, L, 1, 1, dtype=torch.float64)
    M = product_of(ones, ones, 7 * ones[..., 0]).dense()[0, 0]
    equal(M, ones[0, :, 0] @ ones[0, :, 0].T + 6 * torch.eye(L, dtype=torch.float64))
    assert (int(rank(M).below), int(rank(M).above)) == (1, 1)
    equal(forced(M, 1), torch.full((L - 2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2])
def test_3_5_any_other_diagonal_leaves_the_sums_of_scans(order):
    M, changed = well_conditioned(order), torch.randn(L, dtype=torch.float64)
    Q = M - M.diagonal().diag() + changed.diag()
    assert max(int(rank(Q).below), int(rank(Q).above)) == order  # quasiseparable as before
    assert (forced(Q, order) - changed[order:-order]).abs().min() > 1e-3


def test_3_5_a_free_diagonal_makes_up_for_the_shift():
    """Sums of scans with a free diagonal are the quasiseparable matrices again: both ways of writing, one set."""
    M, dense = some(Quasiseparable)
    triangles = []
    for t in M.triangles:  # C_i takes back the decay of row i
        C = per_head(t.C).roll(-1 if t.upper else 1, 1) * (-t.log_decay).exp()[..., None]
        triangles.append(Triangle(t.dt, t.A, per_head(t.B), C, upper=t.upper))
    diagonal = M.diagonal - sum(diagonal_of(t) for t in triangles)
    equal(AddDiagonal(None, tuple(triangles), diagonal).dense()[0], dense)


# ---------------------------------------------------------------------------------------------------------- the page


def test_every_statement_of_the_page_names_a_test_of_this_file():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named == {name for name in globals() if re.match(r"test_\d_\d_", name)}
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    for number in ("2.1", "2.2", "3.1", "3.2", "3.3", "3.4", "3.5"):
        (section,) = [s for s in sections if re.match(rf"(Definition|Corollary) {re.escape(number)}\b", s)]
        assert f"`test_{number.replace('.', '_')}_" in section


def test_the_table_of_the_page_is_what_the_checks_find():
    rows = re.findall(
        r"^\| \[(\w+)\]\(matrices.md#\1\) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    assert [name for name, *_ in rows] == [*MATRICES]
    for name, aligned, bound in rows:
        if name == "mult":
            assert (aligned, bound) == ("no matrix", "no matrix")
            continue
        assert aligned == alignment(name).kind
        assert bound.replace("N", str(N)) == str(promise(MATRICES[name], N))


def test_the_code_of_the_page_runs():
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(code, names)
