"""The matrices of a model as it applied them, their ranks, and whether a class is sequence aligned."""

import re
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from hydra_ssm import MATRICES, Encoder, MatrixMixer, StructuredMatrix
from hydra_ssm.inspection import alignment, mixing_matrices, promise, rank
from hydra_ssm.matrices import Feature

SIZES = {"d_state": 3, "headdim": 8, "max_length": 24}
WITH_MATRIX = [name for name in MATRICES if name != "mult"]
FORMS = [
    pytest.param(name, form, id=f"{name}-{'computed' if form else 'fixed'}")
    for name, matrix in MATRICES.items()
    for form in (True, False)
    if name != "mult" and (matrix.data_dependent if form else matrix.fixed)
]
L = 12


def hybrid():
    """One layer of every class."""
    return Encoder(16, [{"matrix": name} for name in MATRICES], **SIZES).double()


def tokens(*shape):
    return torch.randn(*shape, 16, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- captured


def mixed_with(mixer, M, u):
    """What the block gives for u (1, n, d) with the entries M (H, n, n) in place of its product."""
    z, inputs = mixer._inputs(mixer.in_proj(u), None)
    y = torch.einsum("hij,bjhp->bihp", M, inputs.x)
    y = y + inputs.x if mixer.matrix_class.skip else y
    return mixer.out_proj(mixer.norm(y.flatten(2), z, None))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_captured_matrix_is_the_one_that_the_mixer_applied(name, form):
    mixer = MatrixMixer(16, name, data_dependent=form, **SIZES).double()
    u = tokens(1, L)
    (found,) = mixing_matrices(mixer, u)
    assert found.mixer is mixer
    assert found.heads == (0, 1, 2, 3)
    torch.testing.assert_close(mixed_with(mixer, found.matrices[0], u), mixer(u), rtol=0, atol=1e-12)


@torch.no_grad()
def test_in_a_hybrid_stack_each_layer_has_the_matrix_of_the_input_that_reached_it():
    encoder = hybrid()
    u, mask = tokens(2, L), torch.rand(2, L) > 0.3
    seen = []
    handles = [layer.mixer.register_forward_hook(lambda m, i, o: seen.append((i[0], o))) for layer in encoder.layers]
    found = mixing_matrices(encoder, u, mask)
    for handle in handles:
        handle.remove()
    assert [mixing.layer for mixing in found] == list(range(len(MATRICES)))
    assert found[3].name == "layers.3.mixer"
    for mixing, (before, after) in zip(found, seen, strict=True):
        for row, M in enumerate(mixing.matrices):
            n = int(mask[row].sum())
            expected = mixed_with(mixing.mixer, M, before[row : row + 1, :n])[0]
            torch.testing.assert_close(expected, after[row, :n], rtol=0, atol=1e-12)


@torch.no_grad()
def test_padding_is_left_out_and_documents_come_one_by_one():
    encoder, u, mask = hybrid(), tokens(2, L), torch.rand(2, L) > 0.3
    alone = [mixing_matrices(encoder, u[row, mask[row]][None]) for row in range(2)]
    lengths = mask.sum(1).tolist()
    padded = mixing_matrices(encoder, u.masked_fill(~mask[..., None], torch.nan), mask)
    offsets = torch.tensor([0, lengths[0], sum(lengths)])
    packed = mixing_matrices(encoder, u[mask][None], cu_seqlens=offsets)
    among_padding = torch.cat([u.flatten(0, 1), tokens(5)])[None]  # both: packed documents, and padding between
    both = mixing_matrices(
        encoder, among_padding, torch.cat([mask.flatten(), torch.zeros(5, dtype=torch.bool)])[None],
        torch.tensor([0, L, 2 * L + 5]),
    )  # fmt: skip
    for layer, name in enumerate(MATRICES):
        for document in range(2 if name != "mult" else 0):
            (M,) = alone[document][layer].matrices
            assert M.shape[-1] == lengths[document]
            for other in (padded, packed, both):
                torch.testing.assert_close(other[layer].matrices[document], M, rtol=1e-10, atol=1e-12)


def test_a_mixer_alone_takes_padding_and_packing_too():
    mixer, u, mask = MatrixMixer(16, "attention", **SIZES).double(), tokens(1, L), torch.arange(L)[None] % 3 > 0
    (found,) = mixing_matrices(mixer, u, mask=mask)
    torch.testing.assert_close(found.matrices[0], mixer.matrix(u[mask][None]).dense()[0])
    (found,) = mixing_matrices(mixer, u, None, torch.tensor([0, 5, 5, L]))
    assert [M.shape[-1] for M in found.matrices] == [5, 0, L - 5]
    torch.testing.assert_close(found.matrices[2], mixer.matrix(u[:, 5:]).dense()[0])


def test_looking_changes_nothing_and_leaves_nothing_behind():
    encoder, u = hybrid().float(), tokens(2, L).float()
    before, seen = encoder(u), []
    encoder.register_forward_hook(lambda *given: seen.append(given[-1]))
    mixing_matrices(encoder, u)
    assert torch.equal(seen[0], before)
    with pytest.raises(ValueError, match="u must be"):
        mixing_matrices(encoder, tokens(2, L)[..., :7])
    assert not any(layer.mixer._forward_pre_hooks for layer in encoder.layers)


def test_captured_matrices_are_differentiable():
    mixer = MatrixMixer(16, "quasiseparable", **SIZES)
    mixing_matrices(mixer, tokens(1, L).float())[0].matrices[0].square().sum().backward()
    assert mixer.A_log.grad.abs().sum() > 0


def test_a_class_without_a_matrix_says_why():
    found = {m.mixer.matrix_class: m for m in mixing_matrices(hybrid(), tokens(1, L))}
    assert found[MATRICES["mult"]].missing.startswith("mult is quadratic in x and has no matrix")
    assert found[MATRICES["mult"]].matrices == ()
    assert not found[MATRICES["concat"]].missing


@torch.no_grad()
def test_a_class_without_a_matrix_has_the_factors_that_it_multiplies():
    mixer, u, mask = MatrixMixer(16, "mult", **SIZES).double(), tokens(2, L), torch.rand(2, L) > 0.3
    (found,) = mixing_matrices(mixer, u, mask)
    assert [factor.label for factor in found.factors] == ["0 →", "0 ←"]
    for row, whole in enumerate(zip(*(factor.matrices for factor in found.factors), strict=True)):
        right, left = whole
        own = u[row, mask[row]][None]
        z, inputs = mixer._inputs(mixer.in_proj(own), None)
        y = torch.einsum("hij,bjhp->bihp", right, inputs.x) * torch.einsum("hij,bjhp->bihp", left, inputs.x)
        expected = mixer.out_proj(mixer.norm(y.flatten(2), z, None))
        torch.testing.assert_close(expected, mixer(own), rtol=0, atol=1e-12)
        assert (right.triu(1) == 0).all()
        assert (left.tril(-1) == 0).all()
    (some,) = mixing_matrices(mixer, u, mask, heads=[1, 3])
    assert some.factors[1].heads == (1, 3)
    assert torch.equal(some.factors[1].matrices[0], found.factors[1].matrices[0][[1, 3]])
    assert not mixing_matrices(MatrixMixer(16, "add", **SIZES), tokens(1, L).float())[0].factors


def test_layers_and_heads_can_be_chosen():
    encoder, u = Encoder(16, ["hydra", "attention", "hydra"], **SIZES).double(), tokens(1, L)
    whole = mixing_matrices(encoder, u)
    assert [len(mixing.heads) for mixing in whole] == [4, 2, 4]  # the Transformer's attention has fewer
    some = mixing_matrices(encoder, u, layers=[2, 1], heads=[1, 3])
    assert [(mixing.layer, mixing.heads) for mixing in some] == [(1, (1,)), (2, (1, 3))]
    assert torch.equal(some[1].matrices[0], whole[2].matrices[0][[1, 3]])
    with pytest.raises(ValueError, match="layers must be numbers from 0 to 2, got 3"):
        mixing_matrices(encoder, u, layers=[3])
    with pytest.raises(ValueError, match="heads must be numbers from 0 to 3, got -1"):
        mixing_matrices(encoder, u, heads=[-1])
    with pytest.raises(ValueError, match="the model must hold a MatrixMixer, Linear holds none"):
        mixing_matrices(torch.nn.Linear(2, 2), u)


# ------------------------------------------------------------------------------------------------------------- ranks


def every_block(M, diagonal):
    """The largest rank over all contiguous blocks of the lower triangle, one by one."""
    found = 0
    for (top, bottom), (left, right) in ((r, c) for r in spans(len(M)) for c in spans(len(M))):
        if top >= right - int(diagonal):
            found = max(found, int(torch.linalg.matrix_rank(M[top:bottom, left:right])))
    return found


def spans(n):
    return [(start, end) for start in range(n) for end in range(start + 1, n + 1)]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_ranks_are_the_largest_of_all_blocks(order, diagonal):
    M = torch.randn(7, order, dtype=torch.float64) @ torch.randn(order, 7, dtype=torch.float64)
    M = M + torch.diag(torch.tensor([0.0, 1, 0, 0, 2, 0, 0], dtype=torch.float64))
    M[:3, 3:] = 0
    found = rank(M, diagonal=diagonal)
    assert int(found.below) == every_block(M, diagonal)
    assert int(found.above) == every_block(M.mT, diagonal)
    assert int(found.whole) == int(torch.linalg.matrix_rank(M))


def test_ranks_of_many_matrices_are_those_of_each():
    M = torch.stack([torch.randn(9, 9).tril(), torch.ones(9, 9), torch.eye(9), torch.zeros(9, 9)])
    found = rank(M)
    assert [t.tolist() for t in found] == [[4, 1, 0, 0], [0, 1, 0, 0], [9, 1, 9, 0]]
    assert rank(torch.ones(1, 1)) == (0, 0, 1)
    assert rank(M[0], cuts=[1, 8]).below == 1


PROMISES = {
    "low_rank": (3, 3, 3),
    "semiseparable": (3, 0, None),
    **dict.fromkeys(["quasiseparable", "quasiseparable_shared", "add", "add_diagonal", "add_shift"], (3, 3, None)),
    "concat": (3, 3, None),
    **dict.fromkeys(["dense", "attention", "butterfly", "toeplitz", "dft", "vandermonde", "cauchy"], (None,) * 3),
}


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_each_class_keeps_its_promise_of_rank_and_no_lower_one_would_do(name, form):
    """In float32 too, as models are. Where nothing is promised some block has a rank above N."""
    order, bounds = 3, PROMISES[name]
    assert promise(MATRICES[name], order) == bounds
    mixer = MatrixMixer(16, name, data_dependent=form, **SIZES)
    with torch.no_grad():
        mixer.in_proj.weight.mul_(3)
        for exact in (mixer, mixer.double()):
            dtype = exact.in_proj.weight.dtype
            (found,) = mixing_matrices(exact, tokens(1, 24).to(dtype))
            for number, bound in zip(rank(found.matrices[0]), bounds, strict=True):
                assert int(number.max()) == bound if bound is not None else int(number.max()) > order


def test_a_rank_above_the_promise_is_seen():
    mixer = MatrixMixer(16, "quasiseparable", **SIZES).double()
    M = mixing_matrices(mixer, tokens(1, 24))[0].matrices[0]
    spoiled = M.clone()
    spoiled[1, 20, 3] += 1e-6
    assert rank(M).below.tolist() == [3, 3, 3, 3]
    assert rank(spoiled).below.tolist() == [3, 4, 3, 3]


def test_a_diagonal_however_large_hides_no_rank_beside_it():
    M = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64) + 1e20 * torch.eye(9)
    assert rank(M)[:2] == (2, 2)
    assert rank(M, tolerance=10.0)[:2] == (0, 0)


@pytest.mark.parametrize(
    ("M", "options", "message"),
    [
        (torch.ones(3, 4), {}, "M must be square, (..., L, L), got (3, 4)"),
        (torch.diag(torch.tensor([1.0, torch.nan])), {}, "M must be finite, 1 of its 4 entries are not"),
        (torch.ones(4, 4), {"cuts": [0]}, "cuts must be at least 1 and below 4, got [0]"),
    ],
)
def test_what_has_no_ranks_is_refused(M, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rank(M, **options)


# --------------------------------------------------------------------------------------------------------- alignment

ALIGNMENT = {
    "dense": "no token owns a parameter",
    "attention": "up to row factors",
    "low_rank": "aligned",
    "butterfly": "no token owns a parameter",
    "toeplitz": "leading blocks",
    "dft": "no token owns a parameter",
    "vandermonde": "aligned",
    "cauchy": "aligned",
    "semiseparable": "aligned",
    "quasiseparable": "aligned",
    "quasiseparable_shared": "aligned",
    "add": "aligned",
    "add_diagonal": "aligned",
    "add_shift": "aligned",
    "concat": "aligned",
}


def test_every_class_is_in_the_table_of_alignment():
    assert {*ALIGNMENT, "mult"} == {*MATRICES}


@pytest.mark.parametrize("name", ALIGNMENT)
def test_each_class_is_aligned_as_the_table_says(name):
    assert alignment(name).kind == ALIGNMENT[name]
    assert alignment(MATRICES[name], length=13, order=2).kind == ALIGNMENT[name]
    assert MATRICES[name].data_dependent == (ALIGNMENT[name] != "no token owns a parameter")


def test_a_mistake_in_a_class_is_no_matrix_that_is_missing(monkeypatch):
    monkeypatch.setattr(MATRICES["low_rank"], "entries", lambda self: len(5))
    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        mixing_matrices(MatrixMixer(8, "low_rank", headdim=4, d_state=3), torch.randn(1, 5, 8))


def test_mult_has_no_matrix_to_be_aligned_and_what_is_no_class_is_named():
    with pytest.raises(ValueError, match=r"matrix must be one of .*, got 'hydra'"):
        alignment("hydra")
    with pytest.raises(TypeError, match="mult is quadratic in x"):
        alignment("mult")


MOVED = {  # by token k
    "attention": lambda k, i, j: True,  # the sums of all rows
    "low_rank": lambda k, i, j: k in (i, j),
    "cauchy": lambda k, i, j: k in (i, j),
    "toeplitz": lambda k, i, j: k == abs(i - j),
    "dft": lambda k, i, j: False,
    "semiseparable": lambda k, i, j: j <= k <= i,
    "add": lambda k, i, j: min(i, j) <= k <= max(i, j),
    "add_shift": lambda k, i, j: j <= k < i or i < k <= j,  # row i reads with its neighbour's C
    "quasiseparable": lambda k, i, j: j <= k < i or i < k <= j or k == i == j,
    "concat": lambda k, i, j: min(i, j) <= k <= max(i, j),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_entries_that_a_token_moves_are_known(name):
    expected = [[[MOVED[name](k, i, j) for j in range(9)] for i in range(9)] for k in range(9)]
    assert alignment(name).moved.tolist() == expected


@dataclass(frozen=True)
class Spread(StructuredMatrix):
    """M_ij = q_i + q_j + f, with f of tokens that do not lie between i and j."""

    q: torch.Tensor

    @classmethod
    def features(cls, settings):
        return (Feature("q", (settings.nheads,)),)

    @classmethod
    def build(cls, inputs):
        return cls(inputs.documents, inputs.features["q"])

    def entries(self):
        q = self.q.mT
        return q[..., :, None] + q[..., None, :] + self.far()

    def far(self):
        return self.q.mT.mean(-1)[..., None, None]

    def multiply(self, x):
        raise NotImplementedError


class LastToken(Spread):
    def far(self):
        return self.q.mT[..., -1, None, None]


class FirstToken(Spread):
    def far(self):
        return self.q.mT[..., 0, None, None]


class NextToken(Spread):
    def far(self):
        place = torch.arange(self.q.shape[1])
        return self.q.mT[..., (torch.maximum(place[:, None], place) + 1).clamp(max=place[-1])]


class TokenBefore(Spread):
    def far(self):
        place = torch.arange(self.q.shape[1])
        return self.q.mT[..., (torch.minimum(place[:, None], place) - 1).clamp(min=0)]


class RowScale(Spread):
    """The mean of all tokens is a factor: that is all that is wrong with it."""

    def entries(self):
        q = self.q.mT
        return (q[..., :, None] * q[..., None, :]) * (1 + q.mean(-1)[..., None, None])


@pytest.mark.parametrize(
    ("matrix", "kind"),
    [
        (Spread, "no"),
        (LastToken, "no"),
        (NextToken, "no"),
        (FirstToken, "leading blocks"),
        (TokenBefore, "leading blocks"),
        (RowScale, "up to row factors"),
    ],
)
def test_a_class_that_looks_beyond_a_block_is_found_out(matrix, kind):
    assert alignment(matrix).kind == kind


@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("name", ["quasiseparable", "cauchy"])
def test_the_short_convolution_widens_what_a_token_moves_by_half_its_width(name, width):
    mixer = MatrixMixer(16, name, d_conv=width, **SIZES).double()
    u = tokens(1, L)
    base = mixer.matrix(u).dense()[0]
    k, i, j = 6, *torch.meshgrid(torch.arange(L), torch.arange(L), indexing="ij")
    other = u.clone()
    other[0, k] = torch.randn(16, dtype=torch.float64)
    moved = ((mixer.matrix(other).dense()[0] - base).abs() > 1e-9 * base.abs().max()).any(0)
    half = width // 2
    if name == "cauchy":
        expected = ((i - k).abs() <= half) | ((j - k).abs() <= half)
    else:
        expected = (torch.minimum(i, j) <= k + half) & (torch.maximum(i, j) >= k - half)
        expected &= ~((i > j) & (i == k - half)) & ~((i < j) & (i == k + half))  # the shift: C of the neighbour
    assert torch.equal(moved, expected)


def test_looking_at_a_class_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    alignment("quasiseparable")
    assert torch.equal(torch.get_rng_state(), state)


def test_documents_of_a_packed_row_have_no_weights_between_them():
    """What the offsets cut out is all that there is."""
    mixer, u = MatrixMixer(16, "quasiseparable", **SIZES).double(), tokens(1, L)
    offsets = torch.tensor([0, 4, L])
    (found,) = mixing_matrices(mixer, u, cu_seqlens=offsets)
    whole = mixer.matrix(u, cu_seqlens=offsets).dense()[0]
    for M, (start, end) in zip(found.matrices, pairwise(offsets.tolist()), strict=True):
        assert torch.equal(whole[:, start:end, start:end], M)
    assert whole.abs().sum() == sum(M.abs().sum() for M in found.matrices)
