"""The whole Hydra layer on kernels against its eager form in float64, through Triton's interpreter or on a GPU."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hydra_ssm import Hydra, MatrixMixer
from hydra_ssm.ops import Documents

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # of the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"d_state": 16, "headdim": 16, "d_conv": 3}


def layer(matrix="quasiseparable", d_model=16, **options) -> MatrixMixer:
    """On kernels; parameters differ from head to head, and steps are so large that decays matter."""
    mixer = MatrixMixer(d_model, matrix, **{"impl": "triton"} | SMALL | options).to(DEVICE)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        if hasattr(mixer, "dt_bias"):
            mixer.dt_bias.add_(3.0)
    return mixer


def like(mixer: MatrixMixer, impl: str | None, **options) -> MatrixMixer:
    """A layer of the same parameters that computes in another way."""
    other = copy.deepcopy(mixer)
    other.settings = replace(mixer.settings, impl=impl, **options)
    return other


def weights_of(y: Tensor) -> Tensor:
    return torch.arange(y.numel(), device=DEVICE, dtype=torch.float64).mul(1.7).sin().reshape(y.shape).to(y.dtype)


def trained(mixer: MatrixMixer, u: Tensor, autocast: torch.dtype | None = None, **where: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of a sum of it with fixed weights."""
    u = u.detach().to(mixer.in_proj.weight.dtype).requires_grad_()
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = mixer(u, **where)
    leaves = {"u": u, **dict(mixer.named_parameters())}
    grads = torch.autograd.grad((y * weights_of(y)).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def sizes_of_sums(mixer: MatrixMixer, u: Tensor, where: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each head, what the gradients of dt_bias and A_log would be if no token's part cancelled another's."""
    seen: list[Tensor] = []
    with mixer.in_proj.register_forward_hook(lambda _, inputs, projected: seen.append(projected)):
        y = mixer(u.double(), **where)
    (grad,) = torch.autograd.grad((y * weights_of(y)).sum(), seen)
    heads = mixer.settings.nheads
    dt = torch.nn.functional.softplus(seen[0][..., -2 * heads :].unflatten(-1, (2, heads)) + mixer.dt_bias)
    parts = grad[..., -2 * heads :].unflatten(-1, (2, heads)).abs()
    return {"dt_bias": parts.sum((0, 1, 2)), "A_log": (dt * parts).sum((0, 1, 2))}


def agree(mixer: MatrixMixer, u: Tensor, **where: Tensor) -> None:
    """Exact, or at most twice as far off as the eager form in the same precision where terms cancel."""
    eager = like(mixer, "chunked")
    usual = trained(eager, u, **where)
    eager.double()
    exact, sums = trained(eager, u, **where), sizes_of_sums(eager, u, where)
    for name, found in trained(mixer, u, **where).items():
        assert found.shape == exact[name].shape
        size = max(exact[name].norm(), sums[name].norm() if name in sums else 1e-30)
        error, of_eager = ((t.double() - exact[name]).norm() for t in (found, usual[name]))
        assert error < max(2e-6 * size, 2 * of_eager) or size < 1e-12, name


def holes(length: int) -> dict[str, Tensor]:
    """Of three rows: padding in the middle and at the end, and a row that is nothing else."""
    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    mask[0, 3:7] = mask[0, -1] = mask[1, -5:] = mask[2] = False
    return {"mask": mask}


def packed(*offsets: int) -> dict[str, Tensor]:
    return {"cu_seqlens": torch.tensor(offsets, device=DEVICE)}


CASES = {
    "1 token": ({}, (2, 1), {}),
    "2 tokens": ({}, (2, 2), {}),
    "17 tokens, biases of the projections": ({"bias": True}, (1, 17), {}),
    "33 tokens, groups": ({"ngroups": 2}, (1, 33), {}),
    "mask": ({}, (3, 13), holes(13)),
    "documents": ({}, (1, 34), packed(0, 1, 14, 14, 34)),
    "limits of dt": ({"dt_limit": (0.8, 4.0)}, (1, 7), {}),
    "no bias of the convolution": ({"conv_bias": False, "d_conv": 7}, (1, 17), {}),
    "recomputed": ({"recompute": True}, (3, 13), holes(13)),
    "recomputed documents": ({"recompute": True}, (1, 34), packed(0, 1, 14, 14, 34)),
    "shared B and C": ({"matrix": "quasiseparable_shared"}, (1, 17), {}),
    "initial states": ({"learnable_init_states": True}, (1, 9), packed(0, 6, 9)),
}


@pytest.mark.parametrize(("options", "shape", "where"), CASES.values(), ids=CASES)
def test_the_layer_equals_its_eager_form_in_float64(options, shape, where, monkeypatch) -> None:
    """Where the forward pass is found again, two rows of the batch at a time, or a chunk of a row."""
    monkeypatch.setattr("hydra_ssm.ops.triton.block.RECOMPUTED", 26)
    monkeypatch.setattr("hydra_ssm.ops.triton.block.OF_ONE", 32)
    mixer = layer(**options)
    agree(mixer, torch.randn(*shape, mixer.d_model, device=DEVICE), **where)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, other[name]) for name, t in one.items())


def test_two_runs_agree_to_the_bit_and_recomputing_changes_nothing() -> None:
    mixer, u = layer(), torch.randn(1, 34, 16, device=DEVICE)
    first = trained(mixer, u)
    assert same(trained(mixer, u), first)
    again = like(mixer, "triton", recompute=True)
    assert same(trained(again, u), first)


@pytest.mark.parametrize(("length", "of_one", "most", "count"), [(70, 32, 8, 3), (100, 32, 2, 2)])
def test_a_long_row_that_is_computed_again_in_parts_gives_what_it_gave(
    length, of_one, most, count, monkeypatch
) -> None:
    """With three heads; the same bits from memory that may hold anything."""
    import hydra_ssm.ops.triton.block as block

    whole, u = layer(d_model=24), torch.randn(1, length, 24, device=DEVICE)
    monkeypatch.setattr(block, "RECOMPUTED", 32)
    monkeypatch.setattr(block, "OF_ONE", of_one)
    monkeypatch.setattr(block, "PARTS", most)
    parts, seen = [], block.norm_backward
    monkeypatch.setattr(block, "norm_backward", lambda *a: parts.append(1) or seen(*a))
    again, where = like(whole, "triton", recompute=True), packed(0, 1, 40, length)
    first = trained(again, u, **where)
    assert len(parts) == count
    for name, expected in trained(whole, u, **where).items():
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=2e-6 * expected.abs().max().item(), msg=name)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert same(trained(again, u, **where), first)


@pytest.mark.parametrize("recompute", [False, True])
def test_fresh_memory_and_padding_may_hold_anything(recompute, monkeypatch) -> None:
    mixer, u, where = layer(recompute=recompute), torch.randn(1, 13, 16, device=DEVICE), holes(13)
    where["mask"] = where["mask"][:1]
    clean = trained(mixer, u, **where)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    assert same(trained(mixer, u.masked_fill(~where["mask"][..., None], torch.nan), **where), clean)


def poisoned(make):
    def filled(*args, **options) -> Tensor:
        t = make(*args, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    return filled


def test_a_graph_that_is_kept_gives_its_gradients_again() -> None:
    """Without it they may be written over what was saved: then nothing that others can read may change."""
    mixer, u = layer(), torch.randn(1, 7, 16, device=DEVICE)
    once = trained(mixer, u)
    u.requires_grad_()
    y = mixer(u)
    kept = y.detach().clone()
    loss, leaves = (y * weights_of(y)).sum(), [u, *mixer.parameters()]
    for last in (False, False, True):
        grads = torch.autograd.grad(loss, leaves, retain_graph=not last)
        assert all(torch.equal(a, b) for a, b in zip(grads, list(once.values())[1:], strict=True))
    assert torch.equal(y, kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


OVER = {
    "groups": ({"ngroups": 2, "expand": 4}, (2, 33), {}, torch.float32),
    "documents in stretches": ({}, (1, 150), packed(0, 1, 14, 100, 150), torch.float32),
    "mask": ({"expand": 3}, (3, 40), holes(40), torch.float32),
    "one chunk in two tiles": ({}, (2, 100), {}, torch.float16),
}


@pytest.mark.parametrize(("options", "shape", "where", "dtype"), OVER.values(), ids=OVER)
def test_gradients_over_what_was_kept_are_those_beside_it(options, shape, where, dtype, monkeypatch) -> None:
    """A graph that is kept has its own memory written over by its last backward pass alone; parts of two chunks."""
    monkeypatch.setattr("hydra_ssm.ops.triton.plan.HELD", 64)
    mixer, u = layer(**options).to(dtype), torch.randn(*shape, 16, device=DEVICE).to(dtype).requires_grad_()
    if shape[1] > 128:
        from hydra_ssm.ops.triton import plan

        states = plan.StatesConfig
        monkeypatch.setattr(plan, "StatesConfig", lambda stretch=0, **more: states(stretch=min(stretch, 2), **more))
    y = mixer(u, **where)
    loss, leaves = (y * weights_of(y)).sum(), [u, *mixer.parameters()]
    beside, over = (torch.autograd.grad(loss, leaves, retain_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(beside, over, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_diagonal_that_is_projected_apart_has_its_weight_cast_once_for_both_passes(recompute, monkeypatch) -> None:
    """Under autocast; as exact as the eager form, and a graph that is kept gives the same."""
    import hydra_ssm.ops.triton.block as block

    monkeypatch.setattr("hydra_ssm.ops.triton.plan.NARROW", 0)
    seen, backward = [], block.block_backward
    monkeypatch.setattr(block, "block_backward", lambda *a: seen.append(a[6].cast) or backward(*a))
    mixer, u = layer(recompute=recompute), torch.randn(2, 40, 16, device=DEVICE)
    usual, exact = trained(like(mixer, "chunked"), u, torch.float16), trained(like(mixer, "chunked").double(), u)
    for name, found in trained(mixer, u, torch.float16).items():
        error, of_eager = ((t.double() - exact[name]).norm() for t in (found, usual[name]))
        assert error <= 2 * of_eager + 5e-4 * exact[name].norm(), name
    assert torch.equal(seen[0], mixer.fc_D.weight.half())


def test_who_looks_at_the_projection_keeps_it() -> None:
    mixer, u, seen = layer(), torch.randn(1, 7, 16, device=DEVICE), []
    plain = trained(mixer, u)
    with mixer.in_proj.register_forward_hook(lambda _, inputs, projected: seen.append(projected)):
        assert same(trained(mixer, u), plain)
    assert torch.equal(seen[0], mixer.in_proj(u))


def test_compile_takes_the_whole_graph_and_changes_nothing() -> None:
    mixer, u = layer(), torch.randn(1, 7, 16, device=DEVICE)
    whole = copy.deepcopy(mixer)
    whole.compile(fullgraph=True, backend="aot_eager")
    eager, compiled = trained(mixer, u), trained(whole, u)
    for name, found in compiled.items():
        torch.testing.assert_close(found, eager[name], rtol=1e-6, atol=1e-6, msg=name)


def operator_inputs(length: int, keep: bool, requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list:
    """What the operator hydra_ssm::block takes, up to `reuse`; keep: with documents and a bias, else without.

    dtype is the projection's.
    """
    own = dict(layer(conv_bias=keep).named_parameters())
    names = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "fc_D.weight", "norm.weight")
    tensors = [torch.randn(1, length, 132, device=DEVICE).to(dtype), *(own.get(name) for name in names)]
    tensors = [None if t is None else t.detach().requires_grad_(requires_grad) for t in tensors]
    ids = torch.arange(length, device=DEVICE)[None] // 3 if keep else None
    return [*tensors, ids, [2, 16, 1, 16], 0.0, torch.inf, 1e-5]


@pytest.mark.parametrize(("length", "keep"), [(3, False), (34, True)])
def test_the_operators_are_what_pytorch_expects(length, keep) -> None:
    """With nothing that may be written over: opcheck compares what is kept after the backward pass."""
    import hydra_ssm.ops.triton.block  # noqa: F401

    operators = torch.ops.hydra_ssm
    torch.library.opcheck(operators.block.default, (*operator_inputs(length, keep), 0, keep))
    plain = operator_inputs(length, keep, requires_grad=False)
    normed, *kept = operators.block(*plain, 0, keep)
    inputs = (torch.randn_like(normed), *plain, *kept)
    torch.library.opcheck(operators.block_backward.default, inputs)


def test_the_operators_tell_a_compiler_what_they_keep_of_weights_in_float32(monkeypatch) -> None:
    import hydra_ssm.ops.triton.block  # noqa: F401

    monkeypatch.setattr("hydra_ssm.ops.triton.plan.NARROW", 0)
    fakes = {"test_utils": ("test_schema", "test_faketensor")}
    plain = operator_inputs(34, True, requires_grad=False, dtype=torch.float16)
    torch.library.opcheck(torch.ops.hydra_ssm.block.default, (*plain, 0, True), **fakes)
    normed, *kept = torch.ops.hydra_ssm.block(*plain, 0, True)
    assert kept[-1].dtype == torch.float16
    assert kept[-1].shape == (2, 32)
    inputs = (torch.randn_like(normed), *plain, *kept)
    torch.library.opcheck(torch.ops.hydra_ssm.block_backward.default, inputs, **fakes)


def test_a_gradient_of_the_gradient_is_refused_with_an_advice_that_helps() -> None:
    mixer, u = layer(), torch.randn(1, 7, 16, device=DEVICE, requires_grad=True)
    (du,) = torch.autograd.grad(mixer(u).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: gradients of gradients need impl='dense'"):
        du.sum().backward()
    (du,) = torch.autograd.grad(like(mixer, "dense")(u).square().sum(), u, create_graph=True)
    du.sum().backward()
    assert u.grad.abs().sum() > 0


def test_weights_that_come_when_their_module_is_called_are_waited_for() -> None:
    """As offloaded ones do: they are on the meta device until a hook of their module fetches them."""
    mixer, u = layer(), torch.randn(1, 7, 16, device=DEVICE)
    expected = mixer(u)
    for module in (mixer.conv1d, mixer.norm):
        weights = {n: p.detach() for n, p in module.named_parameters()}
        module.to("meta")

        def fetch(module, args, weights=weights) -> None:
            for name, value in weights.items():
                setattr(module, name, torch.nn.Parameter(value))

        module.register_forward_pre_hook(fetch)
    for impl in ("triton", None):
        torch.testing.assert_close(like(mixer, impl)(u), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [20, 40])
def test_programs_that_go_through_all_heads_give_the_same(length, monkeypatch) -> None:
    """As where chunks are many; so few chunks have their heads dealt to several programs."""
    monkeypatch.setattr("hydra_ssm.ops.triton.plan.FEW", 0)
    mixer = layer(expand=4)
    assert mixer.settings.nheads == 4
    agree(mixer, torch.randn(1, length, 16, device=DEVICE))


@pytest.mark.parametrize("matrix", ["semiseparable", "add", "add_diagonal", "add_shift", "concat", "mult"])
def test_the_other_scans_go_through_the_kernels_too(matrix) -> None:
    mixer = layer(matrix, headdim=16, expand=4)
    u, where = torch.randn(1, 20, 16, device=DEVICE), packed(0, 7, 20)
    exact = trained(like(mixer, "chunked").double(), u, **where)
    for name, found in trained(mixer, u, **where).items():
        assert (found.double() - exact[name]).norm() < 2e-5 * exact[name].norm(), name


MISFITS = {
    "headdim": ({"headdim": 8}, "a headdim of 16, 32, 64, 128, got 8"),
    "state": ({"d_state": 20}, "a state of 16, 32, 64, 128, got 20"),
    "convolution": ({"d_conv": 1}, "a convolution over 3, 5, 7, 9 tokens, got 1"),
    "dtype": ({"dtype": torch.float64}, "x in float32, float16 or bfloat16, got torch.float64"),
    "another class": ({"matrix": "low_rank", "d_conv": 1}, "a convolution over 3, 5, 7, 9 tokens, got 1"),
}


@pytest.mark.parametrize(("options", "message"), MISFITS.values(), ids=MISFITS)
def test_a_layer_by_triton_runs_or_says_what_it_needs(options, message) -> None:
    mixer = layer(**options)
    u = torch.randn(1, 5, 16, device=DEVICE, dtype=mixer.in_proj.weight.dtype)
    with pytest.raises(ValueError, match=f'impl="triton" needs {message}'):
        mixer(u)
    assert like(mixer, None)(u).shape == u.shape


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_as_exact_as_the_eager_form(dtype) -> None:
    """Long on a GPU, where it costs nothing."""
    length = 300 if DEVICE == "cuda" else 9
    mixer, u = layer(), torch.randn(3, length, 16, device=DEVICE)
    where = holes(length)
    exact = trained(like(mixer, "chunked").double(), u, **where)
    ours, eager = (trained(m, u, dtype, **where) for m in (mixer, like(mixer, "chunked")))
    unit = torch.finfo(dtype).eps  # lucky sums of the eager form are no bar
    for name, e in exact.items():
        theirs = (eager[name].double() - e).norm()
        assert (ours[name].double() - e).norm() <= 2 * theirs + unit * e.norm(), name


@pytest.mark.gpu
def test_kernels_are_what_a_gpu_runs_unless_told_otherwise() -> None:
    mixer, u = layer(), torch.randn(1, 40, 16, device=DEVICE)
    compiled = like(mixer, None)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for chosen in (like(mixer, None), compiled):
        assert same(trained(chosen, u), trained(mixer, u))
    assert isinstance(Hydra(16, **SMALL).to(DEVICE)(u), Tensor)


def test_parameters_and_document_numbers_of_any_strides() -> None:
    mixer, u = layer(), torch.randn(2, 19, 16, device=DEVICE)
    ids = torch.arange(19, device=DEVICE) // 5
    expected = mixer(u, documents=Documents(ids.repeat(2, 1)))
    turned = mixer.conv1d.weight.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = {"conv1d.weight": turned, "A_log": mixer.A_log.detach().repeat(3, 1).T.contiguous()[:, 1]}
    for documents in (Documents(ids.expand(2, 19)), Documents(ids.repeat(2, 2)[:, :19])):
        again = torch.func.functional_call(mixer, strided, (u,), {"documents": documents})
        torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_that_shall_have_one_itself_is_refused_even_if_nothing_is_retained() -> None:
    for recompute in (False, True):
        mixer, u = layer(recompute=recompute), torch.randn(1, 7, 16, device=DEVICE, requires_grad=True)
        (du,) = torch.autograd.grad(mixer(u).square().sum(), u, create_graph=True, retain_graph=False)
        with pytest.raises(RuntimeError, match="differentiable once"):
            du.sum().backward()


def test_what_is_computed_again_is_computed_as_before_whatever_the_backward_pass_is_called_under() -> None:
    mixer, u, grads = layer(), torch.randn(1, 40, 16, device=DEVICE), []
    for one in (mixer, like(mixer, "triton", recompute=True)):
        projected = one.in_proj(u).detach().requires_grad_()
        one.in_proj.register_forward_hook(lambda *_, projected=projected: projected)
        loss = one(u).square().sum()
        with torch.autocast(DEVICE, torch.bfloat16):
            grads += torch.autograd.grad(loss, projected)
    assert torch.equal(*grads)


def test_a_part_whose_forward_was_replaced_is_called() -> None:
    """As accelerate replaces it, to bring weights from elsewhere."""
    for name in ("conv1d", "norm", "out_proj"):
        mixer = layer()
        part, calls = getattr(mixer, name), []
        usual = part.forward
        part.forward = lambda *a, usual=usual, calls=calls: calls.append(1) or usual(*a)
        mixer(torch.randn(1, 5, 16, device=DEVICE))
        assert calls, name


def test_hooks_of_parts_are_called() -> None:
    mixer, u = layer(), torch.randn(1, 7, 16, device=DEVICE)
    expected, calls = mixer(u), []
    mixer.norm.register_forward_hook(lambda *_: calls.append("norm"))
    mixer.conv1d.register_forward_pre_hook(lambda *_: calls.append("conv1d"))
    torch.testing.assert_close(mixer(u), expected, rtol=1e-5, atol=1e-5)
    assert calls == ["conv1d", "norm"]


def test_many_heads_have_the_diagonal_too() -> None:
    """More than the value gradients take it for."""
    agree(layer(d_model=1040, expand=2), torch.randn(1, 3, 1040, device=DEVICE))


def test_heads_and_values_that_fill_no_block_are_projected_whole() -> None:
    agree(layer(d_model=72, expand=2), torch.randn(2, 5, 72, device=DEVICE))  # 9 heads by two, 144 numbers by 128


def test_a_diagonal_is_the_same_whoever_multiplies() -> None:
    from hydra_ssm.ops.triton.decay import Projection, Steps, chunk_decays

    x, weight, offset = (torch.randn(s, device=DEVICE) for s in ((2, 37, 48), (9, 48), (9,)))
    dt = torch.rand(2, 37, 9, device=DEVICE)
    projection = Projection(x, weight, offset)
    steps = Steps(dt, dt, -torch.rand(9, device=DEVICE))
    exact = (x.double() @ weight.double().T + offset.double()).mT
    for form in (projection, projection.multiplied()):
        found = chunk_decays(steps, None, form, 16, False).diagonal
        torch.testing.assert_close(found[..., :37].double(), exact, rtol=1e-5, atol=1e-5)


def test_walks_read_far_ahead_where_they_are_long_and_fill_no_second_wave() -> None:
    from hydra_ssm.ops.triton.states import StatesConfig

    how = StatesConfig(stages=3, deep=7, processors=132)
    walks = {(96, 128): 7, (192, 128): 3, (384, 32): 7, (768, 32): 7, (768, 8): 3, (3072, 32): 3}
    assert {key: how.ahead(*key) for key in walks} == walks
    assert StatesConfig(stages=3).ahead(768, 32) == 3


def test_little_of_a_narrow_layer_has_its_diagonal_projected_beside_the_decays() -> None:
    from hydra_ssm.ops.triton.plan import plan

    def projects(batch: int, length: int, heads: int) -> bool:
        x, B = torch.empty(batch, length, heads, 64, device="meta"), torch.empty(batch, length, 1, 64, device="meta")
        return plan(x.half(), B.half()).project

    assert projects(8, 128, 8)  # 512 numbers, 8 chunks
    assert not projects(8, 128, 9)
    assert projects(32, 128, 4)
    assert not projects(33, 128, 4)


def test_sums_over_parts_of_the_batch_are_not_rounded_in_between(monkeypatch) -> None:
    import hydra_ssm.ops.triton.block as block

    rows, length = (32, 7) if DEVICE == "cuda" else (12, 3)  # the interpreter needs a second for each row
    monkeypatch.setattr(block, "RECOMPUTED", length)
    whole = layer(conv_bias=True).half()
    u = torch.randn(rows, length, 16, device=DEVICE).half()
    exact = trained(like(whole, "chunked").double(), u)
    parts, at_once = trained(like(whole, "triton", recompute=True), u), trained(whole, u)
    for name in ("conv1d.weight", "norm.weight", "fc_D.weight"):
        errors = [(grads[name].double() - exact[name]).norm() for grads in (parts, at_once)]
        assert errors[0] < 1.1 * errors[1], name
