"""The block: its options, precisions, lengths, errors, and what compiles."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hydra_ssm import MATRICES, Hydra, MatrixMixer, SelfAttention

SMALL = {"d_state": 4, "headdim": 8}
DATA_DEPENDENT = [name for name, c in MATRICES.items() if c.data_dependent]
FIXED = [name for name, c in MATRICES.items() if c.fixed]


@pytest.mark.parametrize("name", DATA_DEPENDENT)
@pytest.mark.parametrize("length", [1, 2, 37, 131])
def test_data_dependent_classes_work_at_any_length(name, length):
    m = MatrixMixer(16, name, max_length=20, **SMALL)
    assert m(torch.randn(2, length, 16)).shape == (2, length, 16)


@pytest.mark.parametrize("name", FIXED)
def test_fixed_classes_take_what_is_shorter_and_refuse_what_is_longer(name):
    m = MatrixMixer(16, name, data_dependent=False, max_length=20, **SMALL)
    for length in (1, 7, 20):
        assert m(torch.randn(2, length, 16)).isfinite().all()
    with pytest.raises(ValueError, match="lengths up to max_length = 20, got 21"):
        m(torch.randn(2, 21, 16))
    with pytest.raises(ValueError, match="lengths up to max_length = 20, got 21"):
        m(torch.randn(1, 30, 16), cu_seqlens=torch.tensor([0, 9, 30]))
    assert m(torch.randn(1, 30, 16), cu_seqlens=torch.tensor([0, 10, 30])).isfinite().all()


def test_the_features_of_the_fixed_form_are_tables_of_positions():
    m = MatrixMixer(16, "attention", data_dependent=False, max_length=9, **SMALL)
    one, other = torch.randn(2, 1, 9, 16)
    torch.testing.assert_close(m.matrix(one).dense(), m.matrix(other).dense())
    m(one).sum().backward()
    assert m.get_parameter("tables.k").grad.abs().sum() > 0


def test_hydra_has_the_released_names_and_shapes():
    shapes = {
        n: tuple(p.shape)
        for n, p in Hydra(32, 16, headdim=16, ngroups=2, learnable_init_states=True).named_parameters()
    }
    assert shapes == {
        "in_proj.weight": (64 + 64 + 4 * 2 * 16 + 2 * 4, 32),
        "conv1d.weight": (64 + 4 * 2 * 16, 1, 7),
        "conv1d.bias": (64 + 4 * 2 * 16,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "fc_D.weight": (4, 64),
        "init_states": (4, 16, 16),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


def test_initialisation_follows_the_paper():
    m = Hydra(512, headdim=8)
    dt = torch.nn.functional.softplus(m.dt_bias)
    assert 1e-3 <= dt.min() < 2e-3
    assert 5e-2 < dt.max() <= 0.1 + 1e-6
    assert m.A_log.abs().max() == 0
    assert (m.D == 1).all()
    A = Hydra(512, headdim=8, A_init_range=(1, 16)).A_log.exp()
    assert 1 <= A.min() < 3
    assert 12 < A.max() <= 16 + 1e-5
    assert m.no_weight_decay() == {"A_log", "dt_bias", "D"}


def test_dt_limit_bounds_the_steps():
    m = Hydra(16, dt_limit=(0.01, 0.05), **SMALL)
    dt = m.matrix(20 * torch.randn(1, 50, 16)).triangles[0].dt.detach()
    assert dt.min() == pytest.approx(0.01)
    assert dt.max() == pytest.approx(0.05)


def test_bias_options_add_biases():
    names = {n for n, _ in Hydra(16, bias=True, conv_bias=False, **SMALL).named_parameters()}
    assert {"in_proj.bias", "out_proj.bias"} < names
    assert "conv1d.bias" not in names


def test_shared_B_and_C_serve_both_directions():
    m = MatrixMixer(16, "quasiseparable_shared", **SMALL)
    causal, anticausal = m.matrix(torch.randn(1, 9, 16)).triangles
    assert causal.B is anticausal.B
    assert m.in_proj.out_features == 32 + 32 + 2 * 4 + 2 * 4


def test_self_attention_is_the_transformers():
    m = SelfAttention(32, headdim=8).double()
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    v, q, k = m.in_proj.weight.split(32)
    vb, qb, kb = m.in_proj.bias.split(32)
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([q, k, v]), "in_proj_bias": torch.cat([qb, kb, vb]),
            "out_proj.weight": m.out_proj.weight, "out_proj.bias": m.out_proj.bias,
        }
    )  # fmt: skip
    u, mask = torch.randn(2, 11, 32, dtype=torch.float64), torch.ones(2, 11, dtype=torch.bool)
    mask[1, 6:] = False
    expected = reference(u, u, u, key_padding_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(m(u, mask)[mask], expected[mask], rtol=0, atol=1e-12)


def test_the_matrix_of_a_trained_layer_is_differentiable_and_mixes_as_the_layer_does():
    m = Hydra(16, **SMALL).double()
    u = torch.randn(2, 9, 16, dtype=torch.float64)
    M = m.matrix(u).dense()
    assert M.shape == (2, 4, 9, 9)
    M.square().sum().backward()
    assert m.A_log.grad.abs().sum() > 0
    z, inputs = m._inputs(m.in_proj(u), None)
    y = torch.einsum("bhij,bjhp->bihp", M, inputs.x).flatten(2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * m.norm.weight * torch.nn.functional.silu(z)
    torch.testing.assert_close(m.out_proj(y), m(u))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_half_precision_modules_and_autocast_stay_near_float32(name, dtype):
    exact = MatrixMixer(32, name, headdim=16, d_state=8)
    u = torch.randn(2, 70, 32)
    y = exact(u)
    half = copy.deepcopy(exact).to(dtype)
    for parameter in ("A_log", "dt_bias", "D"):
        if hasattr(half, parameter):
            assert getattr(half, parameter).dtype == torch.float32
            assert torch.equal(getattr(half, parameter), getattr(exact, parameter))
    close = 8 * torch.finfo(dtype).eps
    plain = half(u.to(dtype))
    assert plain.dtype == dtype
    assert (plain.float() - y).norm() < close * y.norm()
    with torch.autocast("cpu", dtype):
        cast = exact(u.requires_grad_())
        loss = cast.float().square().sum()  # a mean's gradients would underflow in fp16, as they do unscaled
    found = torch.autograd.grad(loss, [*exact.parameters()], allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(y.square().sum(), [*exact.parameters()], allow_unused=True, materialize_grads=True)
    assert cast.dtype == dtype
    assert (cast.float() - y).norm() < close * y.norm()
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 4 * close * b.norm()


@pytest.mark.parametrize("name", ["quasiseparable", "concat"])
def test_decays_are_float32_whatever_the_parameters_are(name):
    """Sharding and assigned state dicts may leave them in half precision."""
    m = MatrixMixer(16, name, **SMALL)
    half = {n: p.to(torch.bfloat16) for n, p in m.state_dict().items()}
    m.load_state_dict(half, assign=True)
    assert m.matrix(torch.randn(1, 9, 16, dtype=torch.bfloat16)).triangles[0].log_decay.dtype == torch.float32


def test_parameters_may_be_functional_or_parametrized():
    m, u = Hydra(16, **SMALL), torch.randn(1, 9, 16)
    other = {n: 1.1 * p for n, p in m.named_parameters()}
    moved = copy.deepcopy(m)
    moved.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(m, other, u), moved(u))
    torch.nn.utils.parametrize.register_parametrization(m, "A_log", torch.nn.Identity())
    assert m(u).isfinite().all()


@pytest.mark.parametrize("name", MATRICES)
def test_torch_func_gives_each_example_its_gradient_and_gradients_of_gradients(name):
    """Those of a backward pass for each example, and their differences: there closed forms make the gradients."""
    m = MatrixMixer(16, name, max_length=20, **SMALL).double()
    parameters = {n: p.detach() for n, p in m.named_parameters()}
    u, mask = torch.randn(3, 9, 16, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [5], [1]])

    def energy(parameters, u, mask):
        return torch.func.functional_call(m, parameters, (u[None], mask[None])).square().sum()

    def backward(u, mask):
        leaves = [u.requires_grad_(), *m.parameters()]
        return torch.autograd.grad(energy(dict(m.named_parameters()), u, mask), leaves, materialize_grads=True)

    of_parameters, of_u = torch.func.vmap(torch.func.grad(energy, argnums=(0, 1)), (None, 0, 0))(parameters, u, mask)
    for i in range(len(u)):
        found = [t[i] for t in (of_u, *of_parameters.values())]
        torch.testing.assert_close(found, list(backward(u[i].clone(), mask[i])))
    gradient = torch.func.grad(lambda u: energy(parameters, u, mask[0]))
    way, step = torch.randn_like(u[0]), 1e-5
    ahead, behind = (backward(u[0] + s * way, mask[0])[0] for s in (step, -step))
    curvature = torch.func.jvp(gradient, (u[0],), (way,))[1]
    torch.testing.assert_close(curvature, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_a_training_step_has_its_shapes_on_the_meta_device(name):
    """Where tools count operations and memory without doing them."""
    m, u = MatrixMixer(16, name, device="meta", **SMALL), torch.randn(2, 9, 16, device="meta", requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool, device="meta")
    m(u, mask).sum().backward()
    assert u.grad.shape == u.shape


def test_a_module_from_the_meta_device_can_be_drawn_anew():
    m = MatrixMixer(16, "attention", data_dependent=False, max_length=20, device="meta", **SMALL)
    hydra = Hydra(512, headdim=8, device="meta")
    for module in (m, hydra):
        module.to_empty(device="cpu")
        for p in module.parameters():
            p.data.fill_(float("nan"))
        module.reset_parameters()
        assert all(p.isfinite().all() for p in module.parameters())
    assert 1e-3 <= torch.nn.functional.softplus(hydra.dt_bias).min() < 2e-3
    assert m.get_parameter("tables.q").std() > 0.5


def test_the_step_floor_and_the_norm_epsilon_are_used():
    m = Hydra(16, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3, **SMALL)
    torch.testing.assert_close(torch.nn.functional.softplus(m.dt_bias), torch.full((4,), 1e-3), rtol=1e-3, atol=0)
    m.norm.eps = 1e6
    assert m(torch.randn(1, 9, 16)).abs().max() < 1e-2


def test_cauchy_keeps_finite_gradients_where_exp_overflows():
    m = MatrixMixer(16, "cauchy", **SMALL)
    m(1000 * torch.randn(1, 9, 16)).sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_a_module_made_in_half_precision_keeps_its_decays_in_float32():
    m = Hydra(16, dtype=torch.bfloat16, **SMALL)
    assert {n for n, p in m.named_parameters() if p.dtype == torch.float32} == {"A_log", "dt_bias", "D"}
    m.double()
    assert all(p.dtype == torch.float64 for p in m.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
def test_every_class_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    m = MatrixMixer(16, name, max_length=24, **SMALL)
    u, mask = torch.randn(2, 20, 16), torch.rand(2, 20) > 0.3
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(u, mask), m(u, mask))


def test_a_deep_copy_and_a_state_dict_carry_everything():
    m = MatrixMixer(16, "cauchy", data_dependent=False, max_length=20, **SMALL)
    other = MatrixMixer(16, "cauchy", data_dependent=False, max_length=20, **SMALL)
    other.load_state_dict(m.state_dict())
    u = torch.randn(1, 20, 16)
    assert torch.equal(other(u), m(u))
    assert torch.equal(copy.deepcopy(m)(u), m(u))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 100}, "headdim must divide expand * d_model = 32, got 100"),
        ({"d_conv": 4}, "d_conv must be odd, so that the convolution has a centre, got 4"),
        ({"ngroups": 3}, "ngroups must divide the 4 heads, got 3"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"matrix": "circulant"}, "matrix must be one of dense, attention,"),
        (
            {"matrix": int},
            "matrix must be a name in hydra_ssm.MATRICES or a class of StructuredMatrix, got <class 'int'>",
        ),
        ({"dt_min": 0.5}, "dt_min must be above 0 and at most dt_max = 0.1, got 0.5"),
        ({"matrix": "dense", "data_dependent": True}, "Dense has a fixed form alone, no data-dependent one"),
        ({"matrix": "concat", "headdim": 32}, "concat needs an even number of heads"),
        ({"A_init_range": (-1, 1)}, "A_init_range must be two rising numbers above 0, got (-1, 1)"),
        ({"dt_limit": (0.5, 0.1)}, "dt_limit must be two rising numbers, the first at least 0, got (0.5, 0.1)"),
        ({"d_stat": 3}, "MatrixMixer has no option d_stat"),
        (
            {"matrix": "attention", "impl": "fast"},
            "impl must be one of recurrent, dense, chunked, plain, triton, got 'fast'",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        MatrixMixer(16, **{"matrix": "quasiseparable", **SMALL, **options})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("u", "error", "message"),
    [
        (torch.zeros(2, 5, 8), ValueError, "u must be (batch, length, d_model = 16), none of them 0, got (2, 5, 8)"),
        (torch.zeros(5, 16), ValueError, "got (5, 16)"),
        (torch.zeros(2, 0, 16), ValueError, "got (2, 0, 16)"),
        (torch.zeros(2, 5, 16, dtype=torch.long), TypeError, "u must be floating point, got torch.int64"),
    ],
)
def test_inputs_that_do_not_fit_are_named(u, error, message):
    with pytest.raises(error) as raised:
        Hydra(16, **SMALL)(u)
    assert message in str(raised.value)


CLOSED = [
    "quasiseparable",
    "semiseparable",
    "concat",
    "mult",
    "cauchy",
    "vandermonde",
]  # their gradients are closed forms


@pytest.mark.parametrize("name", CLOSED)
def test_gradients_of_gradients_are_refused_by_whatever_way_they_are_asked_for(name):
    mixer = MatrixMixer(8, name, headdim=4, d_state=3).double()
    u = torch.randn(1, 70, 8, dtype=torch.float64, requires_grad=True)

    def loss(u):
        return mixer(u).pow(3).sum()

    (once,) = torch.autograd.grad(loss(u), u)
    kept = checkpoint(mixer, u, use_reentrant=False).pow(3).sum()
    for value in (kept, loss(u)):
        (again,) = torch.autograd.grad(value, u, create_graph=True)
        torch.testing.assert_close(again, once, rtol=1e-12, atol=1e-12)
    for ask in (
        lambda: again.sum().backward(retain_graph=True),
        lambda: again.sum().backward(inputs=[u], retain_graph=True),
        lambda: torch.autograd.grad(again.sum(), list(mixer.parameters()), retain_graph=True, allow_unused=True),
        lambda: torch.autograd.functional.hessian(loss, torch.randn(1, 3, 8, dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError, match="differentiable once"):
            ask()


@pytest.mark.parametrize("name", MATRICES)
def test_a_product_with_x_of_other_sizes_is_refused(name):
    mixer = MatrixMixer(16, name, headdim=8, d_state=8, max_length=64)
    M = mixer.matrix(torch.randn(2, 33, 16))
    assert (M @ torch.randn(2, 33, 4, 5)).shape == (2, 33, 4, 5)
    for shape in ((2, 34, 4, 8), (2, 4, 4, 8), (1, 33, 4, 8), (3, 33, 4, 8), (2, 33, 1, 8), (33, 4, 8)):
        with pytest.raises(ValueError, match=r"must (be|have|come)"):
            M @ torch.randn(shape)


@pytest.mark.parametrize("impl", ["chunked", "plain"])
def test_decays_that_forget_at_once_have_exact_gradients_in_float32(impl):
    """What is left of a token after the next one is tiny, and so is what A changes; dt_bias 5 and A 1 and e."""
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        mixer = MatrixMixer(16, "quasiseparable", headdim=8, d_state=4, impl=impl)
        with torch.no_grad():
            mixer.A_log.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0]))
            mixer.dt_bias.fill_(5.0)
        mixer = mixer.to(dtype)
        mixer(torch.randn(1, 150, 16, dtype=torch.float64).to(dtype)).square().sum().backward()
        found.append(mixer.A_log.grad.double())
    exact, ours = found
    assert ((ours - exact).abs() / exact.abs()).max() < 2e-3


def test_a_document_with_nan_has_the_matrices_of_the_others_as_they_are():
    cu_seqlens = torch.tensor([0, 5, 12])
    for name in MATRICES:
        mixer = MatrixMixer(16, name, headdim=8, d_state=8, max_length=16).double()
        u = torch.randn(1, 12, 16, dtype=torch.float64)
        x = torch.randn(1, 12, 4, 8, dtype=torch.float64)
        whole = mixer.matrix(u, cu_seqlens=cu_seqlens)
        u[0, 3] = torch.nan
        M = mixer.matrix(u, cu_seqlens=cu_seqlens)
        torch.testing.assert_close((M @ x)[:, 5:], (whole @ x)[:, 5:])
        if name != "mult":
            torch.testing.assert_close(M.dense()[:, :, 5:], whole.dense()[:, :, 5:])
            assert (M.dense()[:, :, :5, 5:] == 0).all()
