"""The Triton kernels against the float64 recurrence: on the CPU through Triton's interpreter, on a GPU as they are."""

import importlib.util
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hydra_ssm.ops import Documents, Triangle, backend, semiseparable

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    # Of the interpreter: what kernels compute beside a triangle may be infinite, and is replaced.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "dt_f", "dt_b", "A", "B_f", "C_f", "B_b", "C_b", "diagonal")
RAW_NAMES = (*NAMES[:4], "bias", *NAMES[4:])


def case(batch=1, length=40, heads=2, width=16, groups=1, state=16, documents=False, dtype=torch.float32, strong=1.0):
    """(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, diagonal)."""
    x = torch.randn(batch, length, heads, width)
    features = [torch.randn(batch, length, groups, state) / state**0.5 for _ in range(4)]
    dt_f, dt_b = (torch.rand(batch, length, heads) * strong for _ in range(2))
    dt_f[:, length // 2] = 0.0
    ids = None
    if documents is True:
        ids = (torch.rand(batch, length) < 0.15).cumsum(1)
    elif documents:  # tokens of each
        ids = (torch.arange(length) // documents).expand(batch, -1).contiguous()
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
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-12)).detach())


def plan(chunk: int, heads: int, stretch: int, pair: bool):
    from hydra_ssm.ops.triton.output import OutputConfig
    from hydra_ssm.ops.triton.plan import Plan
    from hydra_ssm.ops.triton.states import StatesConfig

    rows = chunk // 2
    return Plan(
        chunk=chunk,
        states=StatesConfig(stretch=stretch),
        output=OutputConfig(heads=heads, rows=rows),
        pair=pair,
    )


CASES = [
    ({}, (32, 2, 0, False)),
    ({"length": 32}, (32, 2, 0, True)),
    ({"length": 29, "heads": 4, "groups": 2, "documents": True, "strong": 4.0}, (32, 2, 0, True)),
    ({"length": 13, "width": 32}, (32, 1, 0, True)),
    ({"documents": True}, (32, 1, 1, False)),
    (
        {"batch": 2, "length": 35, "heads": 4, "groups": 2, "state": 32, "documents": True, "strong": 4.0},
        (32, 2, 0, False),
    ),
    ({"length": 1}, (32, 1, 0, False)),
    ({"length": 2, "width": 64}, (32, 1, 1, True)),
    ({"length": 67, "width": 32, "state": 64}, (16, 2, 1, False)),
    ({"length": 149, "documents": True}, (16, 2, 3, False)),
    # Documents that end where chunks do, some of one chunk and some of more.
    ({"length": 70, "documents": 16}, (16, 2, 0, False)),
    ({"length": 149, "documents": 48}, (16, 2, 3, False)),
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
    how = plan(64, 2, 0, False)
    unit = torch.finfo(dtype).eps / 2  # lucky sums of the eager form are no bar: half a rounding step is
    assert error(forward(args, how), y) <= 2 * error(eager, y) + unit
    ours = backward(dy, args, how)
    for name, a, b, e in zip(NAMES, ours, theirs, grads, strict=True):
        assert error(a, e) <= 2 * error(b, e) + unit, name


def poisoned(make):
    def filled(*args, **options) -> Tensor:
        t = make(*args, **options)
        return t.fill_(torch.nan) if t.is_floating_point() else t

    return filled


PARTS = {
    "rows, the last alone": ({"batch": 3, "heads": 3}, (16, 3, 0, False), 4, 2),
    "rows and groups": ({"batch": 2, "heads": 6, "groups": 2, "documents": True}, (16, 3, 0, False), 1, 2),
    "a row's stretches": ({"length": 36, "heads": 3, "documents": True}, (16, 3, 1, False), 2, 2),
    "stretches of each row": ({"batch": 2, "length": 36, "documents": True}, (16, 2, 2, False), 2, 4),
    "stretches of each row, if they are long": ({"batch": 2, "length": 50}, (16, 2, 0, False), 2, 4),
    "a row without stretches": ({}, (16, 2, 0, False), 1, 1),
}


@pytest.mark.parametrize(("shape", "how", "held", "parts"), PARTS.values(), ids=PARTS)
def test_adjoint_states_for_a_part_at_a_time_change_no_bit(shape, how, held, parts, monkeypatch) -> None:
    """Into fresh memory and, as a layer's backward pass with S kept, over what they are the gradients of."""
    from hydra_ssm.ops.triton import Into, Steps, product, quasiseparable_backward, quasiseparable_forward

    args, how, calls = case(**{"length": 20} | shape), plan(*how), []
    monkeypatch.setattr("hydra_ssm.ops.triton.plan.STRETCH", 2)
    dy = torch.randn_like(args[0])
    each_row = how.states.stretch == 0 and parts > len(dy)  # goes through stretches because it is alone
    at_once = replace(how, states=replace(how.states, stretch=2)) if each_row else how
    whole = backward(dy, args, at_once)
    _, states = quasiseparable_forward(args[0], Steps(*args[1:4]), *args[4:], how=at_once)
    seen = product.value_grads
    monkeypatch.setattr(product, "value_grads", lambda *a: calls.append(1) or seen(*a))
    for owner, name in ((torch, "empty"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    in_parts = backward(dy, args, replace(how, held=held))
    assert len(calls) == parts
    x, dt_f, dt_b, A, *features, ids, diagonal = (t if t is None else t.clone() for t in args)
    together = torch.cat([x.flatten(2), *(f.flatten(2) for f in features)], -1)
    values, *views = together.split([x[0, 0].numel(), *[features[0][0, 0].numel()] * 4], -1)
    values, views = values.unflatten(-1, x.shape[2:]), [v.unflatten(-1, features[0].shape[2:]) for v in views]
    into = Into(values, None, None, *views)
    steps = Steps(dt_f, dt_b, A)
    decays = product.find_decays(values, steps, ids, diagonal, how)
    sums = decays.sums.clone()
    over = quasiseparable_backward(
        dy, values, steps, *views, ids, diagonal, states, replace(how, held=held), into, decays, spent=True
    )
    assert not torch.equal(decays.sums, sums)  # what dt and A need is there now
    for name, a, b, c in zip(NAMES, whole, in_parts, [*over[:4], *over[5:]], strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


ONE_WALK = [(1, 8192, 24, 32), (1, 8192, 32, 0), (2, 8192, 16, 0), (3, 8192, 8, 32), (1, 32768, 32, 32)]


@pytest.mark.parametrize(("batch", "length", "heads", "chunks"), ONE_WALK)
def test_stretches_are_for_fewer_than_32_heads_and_rows_in_parts(batch, length, heads, chunks) -> None:
    from hydra_ssm.ops.triton.plan import plan

    x, B = (torch.empty(batch, length, n, 64, dtype=torch.bfloat16, device="meta") for n in (heads, 1))
    assert plan(x, B, backward=True).states.stretch == chunks


def test_strided_inputs_and_poisoned_memory(monkeypatch) -> None:
    """The layer's tensors are slices of one projection; every element of a result is written."""
    x, dt_f, dt_b, A, *features, ids, diagonal = case(length=21)
    together = torch.cat([x.flatten(2), *(f.flatten(2) for f in features)], -1)
    views = together.split([32, 16, 16, 16, 16], -1)
    strided = (views[0].unflatten(-1, (2, 16)), dt_f, dt_b, A, *(v[:, :, None] for v in views[1:]), ids, diagonal)
    how, dy = plan(16, 2, 0, False), torch.randn_like(x)
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
    "padding": {"padded": 13, "limits": (0.01, 2.0), "batch": 2},
}


@pytest.mark.parametrize("options", RAW.values(), ids=RAW)
def test_raw_steps_equal_softplus_limits_and_padding_in_float64(options) -> None:
    from hydra_ssm.ops.triton import Into, Steps, quasiseparable_backward, quasiseparable_forward

    options = dict(options)
    padded = options.pop("padded", 0)
    x, raw, A_log, bias, limits, *features, ids, diagonal = raw_case(**options)
    if padded:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=DEVICE)
        ids[0, -padded:] = -1
    dy = torch.randn_like(x)
    y, grads = raw_exact((x, raw, A_log, bias, limits, *features, ids, diagonal), dy)
    steps = Steps(raw[:, :, 0], raw[:, :, 1], A_log, bias, limits)
    how = plan(32, 2, 0, True)
    found, states = quasiseparable_forward(x, steps, *features, ids, diagonal, how=how)
    assert error(found, y) < 1e-5
    buffer = torch.full_like(raw, torch.nan)  # as the steps lie, so their gradients
    into = Into(ddt_f=buffer[:, :, 0], ddt_b=buffer[:, :, 1])
    ours = quasiseparable_backward(dy, x, steps, *features, ids, diagonal, states, how=how, into=into)
    assert ours[1].data_ptr() == buffer.data_ptr()
    # A sums what nearly cancels: the last digits of a GPU's exponentials are seen a hundredfold.
    of_A = 1e-5 if DEVICE == "cpu" else 1e-4
    for name, a, b in zip(RAW_NAMES, ours, grads, strict=True):
        assert error(a, b) < (of_A if name == "A" else 1e-5), name
    if padded:
        assert buffer[0, -padded:].count_nonzero() == 0
    again = quasiseparable_backward(dy, x, steps, *features, ids, diagonal, how=how)
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))


SHIFTED = ((True, True), (False, True))  # (upper, strict) of both; their order does not matter
PLAIN = ((False, False), (True, False))


def triangles(args, initial=None, kinds=SHIFTED) -> list[Triangle]:
    """One of each kind."""
    _, dt_f, dt_b, A, B_f, C_f, B_b, C_b, *_ = args
    own = {False: (dt_f, A, B_f, C_f), True: (dt_b, A, B_b, C_b)}
    return [Triangle(*own[upper], upper, strict, initial) for upper, strict in kinds]


def product(args, impl="triton", initial=None, kinds=SHIFTED) -> Tensor:
    """Through the public operation."""
    documents = None if args[8] is None else Documents(args[8])
    return semiseparable(args[0], triangles(args, initial, kinds), documents, diagonal=args[9], impl=impl)


def leaves_of(args, dtype=None) -> tuple:
    return tuple(
        t if k == 8 or t is None else t.detach().to(dtype or t.dtype).requires_grad_() for k, t in enumerate(args)
    )


def agree(args, tolerance=1e-5, initial=None, kinds=SHIFTED) -> None:
    """The operation and all gradients equal the recurrence's in float64.

    Those of A are sums of dt da, which may cancel: their error is measured against A / sum |dt ddt|.
    """
    dy, found = torch.randn_like(args[0]), []
    for impl, dtype in (("triton", None), ("recurrent", torch.float64)):
        leaves = leaves_of(args, dtype)
        S = None if initial is None else initial.detach().to(dtype or initial.dtype).requires_grad_()
        y = product(leaves, impl, S, kinds)
        wanted = [t for k, t in enumerate((*leaves, S)) if k != 8 and t is not None]
        found.append((y, *torch.autograd.grad(y, wanted, dy.to(y.dtype), allow_unused=True, materialize_grads=True)))
    for name, ours, exactly in zip(("y", *NAMES, "initial"), *found, strict=False):
        if name == "A":
            of_steps = [(dt * ddt).abs().sum((0, 1)) for dt, ddt in zip(args[1:3], found[1][2:4], strict=True)]
            assert ((ours - exactly) * args[3]).abs().le(tolerance * sum(of_steps)).all(), name
        else:
            assert error(ours, exactly) < tolerance, name


def examples() -> int:
    """A few where kernels are interpreted; the profile's number on a GPU."""
    return settings.default.max_examples if DEVICE == "cuda" else 5


@settings(max_examples=examples())
@given(
    length=st.integers(1, 70), heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), width=st.sampled_from([16, 32]),
    state=st.sampled_from([16, 32]), documents=st.booleans(), initial=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_equals_the_recurrence(length, heads, width, state, documents, initial, seed) -> None:
    torch.manual_seed(seed)
    args = case(1, length, heads[0], width, heads[1], state, documents)
    S = torch.randn(heads[0], width, state, device=DEVICE) if initial else None
    agree(args, initial=S)


KINDS = {"both": PLAIN, "causal": PLAIN[:1], "anticausal": PLAIN[1:], "one shifted": SHIFTED[:1]}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("length", [1, 33, 70])
def test_triangles_with_a_diagonal_and_single_ones_equal_the_recurrence(length, kinds) -> None:
    args = case(1, length, 4, groups=2, documents=length > 1)
    agree(args, initial=torch.randn(4, 16, 16, device=DEVICE), kinds=kinds)


@pytest.mark.parametrize("length", [100, 140])
def test_triangles_with_a_diagonal_are_as_exact_as_the_eager_form_in_half_precision(length) -> None:
    """Where steps are folded into the sums, in one chunk of two tiles and in several."""
    args = case(length=length, documents=True, dtype=torch.float16)
    dy, found = torch.randn_like(args[0]), []
    for impl, dtype in (("triton", None), ("chunked", None), ("recurrent", torch.float64)):
        leaves = leaves_of(args, dtype)
        y = product(leaves, impl, kinds=PLAIN)
        wanted = [t for k, t in enumerate(leaves) if k != 8]
        found.append((y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))))
    for name, a, b, e in zip(("y", *NAMES), *found, strict=True):
        assert error(a, e.detach()) <= 2 * error(b, e.detach()) + torch.finfo(torch.float16).eps / 2, name


def test_a_thousand_documents_in_a_row_do_not_read_each_other() -> None:
    tokens = torch.randint(1, 4, (1000,))
    ids = torch.repeat_interleave(torch.arange(1000), tokens)[None].to(DEVICE)
    args = list(case(length=ids.shape[1], heads=1))
    args[8] = ids
    dy, how = torch.randn_like(args[0]), plan(128, 1, 1, False)
    leaves = leaves_of(args, torch.float64)
    y = product(leaves, "chunked")
    grads = torch.autograd.grad(y, [t for k, t in enumerate(leaves) if k != 8], dy.double())
    assert error(forward(args, how), y) < 1e-6
    for name, ours, exactly in zip(NAMES, backward(dy, args, how), grads, strict=True):
        assert error(ours, exactly) < 1e-5, name


def test_a_document_of_one_token_reads_its_diagonal_alone() -> None:
    args = list(case(length=40))
    args[8] = torch.tensor([[0] * 19 + [1] + [2] * 20], device=DEVICE)
    assert torch.equal(product(args)[:, 19], args[0][:, 19] * args[9][:, 19, :, None])
    agree(args)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_values_keep_their_digits(scale) -> None:
    x, *rest = case(length=21)
    agree((x * scale, *rest))


def test_steps_of_zero_leave_the_state_alone_and_give_exact_gradients() -> None:
    x, dt_f, dt_b, *rest = case(length=35)
    agree((x, dt_f * 0, dt_b * 0, *rest))


@pytest.mark.parametrize("strong", [20.0, 1e3, 1e6])
def test_strong_decay_is_exact(strong) -> None:
    agree(case(length=40, strong=strong))


def test_strong_decay_costs_float32_no_digits() -> None:
    """Sums of logarithms are in the thousands there, and their differences small."""
    x, dt_f, dt_b, A, *rest = case(length=70, documents=True)
    dt_f, dt_b = (torch.where(torch.rand_like(dt) < 0.5, dt / 100, dt) for dt in (dt_f, dt_b))
    args, dy = (x, dt_f, dt_b, 100 * A, *rest), torch.randn_like(x)
    y, grads = exact(args, dy)
    assert error(forward(args, plan(64, 2, 0, False)), y) < 2e-7
    for name, a, b in zip(NAMES, backward(dy, args, plan(64, 2, 0, False)), grads, strict=True):
        if name not in ("dt_f", "dt_b", "A"):
            assert error(a, b) < 5e-7, name


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("step", [2.0, 5.0])
def test_gradients_of_a_keep_their_digits_where_tokens_forget_at_once(step, documents) -> None:
    """What neighbours give, of which nothing decays, is nearly all of the sums and no part of these gradients."""
    x, dt_f, dt_b, _, *rest = case(length=75, heads=4, documents=documents)
    A = torch.tensor([-1.0, -2.718, -1.5, -2.0], device=DEVICE)
    args, dy = (x, step + dt_f, step + dt_b, A, *rest), torch.randn_like(x)
    ours = backward(dy, args, plan(16, 2, 0, False))[NAMES.index("A")]
    theirs = exact(args, dy)[1][NAMES.index("A")]
    assert ((ours - theirs) / theirs).abs().max() < 1e-4  # head by head


def test_tokens_after_decay_beyond_all_numbers_keep_their_digits() -> None:
    x, dt_f, dt_b, *rest = case(length=40, strong=1e5)
    dt_f[:, ::3] *= 1e-6
    dt_b[:, ::3] *= 1e-6
    agree((x, dt_f, dt_b, *rest), 1e-4)


@pytest.mark.parametrize("length", [1, 2, 45])
def test_learned_initial_states_are_read_at_every_document_start(length) -> None:
    args = case(batch=2, length=length, documents=length > 2)
    agree(args, initial=torch.randn(2, 16, 16, device=DEVICE))


def test_triangles_may_have_decays_of_their_own() -> None:
    args, own = case(length=21), torch.tensor([[-0.2, -0.7], [-1.1, -0.4]], device=DEVICE).unbind()
    found = []
    for impl, dtype in (("triton", torch.float32), ("recurrent", torch.float64)):
        wide = [t if t is None else t.to(dtype) for t in args]
        A = [a.to(dtype).requires_grad_() for a in own]
        both = [replace(t, A=a) for t, a in zip(triangles(wide), A, strict=True)]
        y = semiseparable(wide[0], both, impl=impl)
        found.append((y, *torch.autograd.grad(y.square().sum(), A)))
    assert all(error(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def operator_inputs(length=33, raw=True, keep=True, diagonal=True, requires_grad=True) -> tuple:
    """What the operator hydra_ssm::quasiseparable takes."""
    if raw:
        x, both, A, bias, limits, *features, ids, d = raw_case(length=length, documents=True, heads=1)
        dt_f, dt_b = both.unbind(2)
    else:
        (x, dt_f, dt_b, A, *features, ids, d), bias, limits = case(length=length, heads=1), None, (0.0, torch.inf)
    floats = (x, dt_f, dt_b, A, bias, *features, d if diagonal else None)
    *floats, d = (t if t is None else t.detach().requires_grad_(requires_grad) for t in floats)
    return (*floats, ids, d, *limits, raw, keep)


OPERATOR_CASES = [{}, {"length": 13, "raw": False, "keep": False, "diagonal": False}]


@pytest.mark.parametrize("options", OPERATOR_CASES, ids=str)
def test_the_operators_are_what_pytorch_expects(options) -> None:
    import hydra_ssm.ops.triton  # noqa: F401

    operators = torch.ops.hydra_ssm
    torch.library.opcheck(operators.quasiseparable.default, operator_inputs(**options))
    *plain, keep = operator_inputs(**options, requires_grad=False)
    y, states = operators.quasiseparable(*plain, keep)
    torch.library.opcheck(operators.quasiseparable_backward.default, (torch.randn_like(y), *plain, states))


def test_recomputed_states_give_the_same_gradients() -> None:
    from hydra_ssm.ops.triton import Steps, quasiseparable

    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        x, dt_f, dt_b, A, bias, *features, ids, diagonal, low, high, _, _ = operator_inputs()
        steps = Steps(dt_f, dt_b, A, bias, (low, high))
        y = quasiseparable(x, steps, *features, ids, diagonal, recompute=recompute)
        found.append(torch.autograd.grad(y.sum(), [x, dt_f, dt_b, A, bias, *features, diagonal]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compile_takes_the_whole_graph_and_changes_nothing() -> None:
    def f(args):
        return product(args).sin()

    args = leaves_of(case(length=40, documents=True))
    leaves = [t for k, t in enumerate(args) if k != 8]
    whole = torch.compile(f, fullgraph=True, backend="aot_eager")
    found = [(y := g(args), *torch.autograd.grad(y.sum(), leaves)) for g in (f, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_takes_values_and_features_in_its_dtype_and_steps_as_they_are() -> None:
    args = leaves_of(case(length=21))
    with torch.autocast(DEVICE, torch.float16):
        y = product(args)
    assert y.dtype == torch.float16
    wanted = [t if k not in (0, 4, 5, 6, 7) else t.half() for k, t in enumerate(args)]
    assert torch.equal(y, product(wanted))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for k, t in enumerate(args) if k != 8)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    args = leaves_of(case(length=13))
    (dx,) = torch.autograd.grad(product(args).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def in_float64(t: Triangle) -> Triangle:
    return replace(t, dt=t.dt.double(), A=t.A.double(), B=t.B.double(), C=t.C.double())


MISFITS = {
    "two alike": (lambda x, t: (x, [t[0], t[0]]), "both strict or none, got strict anticausal, strict anticausal"),
    "one strict": (lambda x, t: (x, [t[0], replace(t[1], strict=False)]), "got strict anticausal, causal"),
    "float64": (
        lambda x, t: (x.double(), [in_float64(k) for k in t]),
        "float32, float16 or bfloat16, got torch.float64",
    ),
    "headdim": (lambda x, t: (x[..., :15], t), "headdim of 16, 32, 64, 128, got 15"),
    "state": (
        lambda x, t: (x, [replace(k, B=k.B[..., :9], C=k.C[..., :9]) for k in t]),
        "state of 16, 32, 64, 128, got 9",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_triton_by_name_runs_or_says_what_it_needs(change, message) -> None:
    args = case(length=5)
    x, both = change(args[0], triangles(args))
    with pytest.raises(ValueError, match=message):
        semiseparable(x, both, impl="triton")
    assert semiseparable(x, both).shape == x.shape


def test_triton_by_name_needs_the_package_and_a_device(monkeypatch) -> None:
    args = tuple(t if t is None else t.cpu() for t in case(length=5))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, or TRITON_INTERPRET=1 when Python starts"):
        product(args)
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    with pytest.raises(ImportError, match="triton, which is not installed"):
        product(args)
    assert product(args, impl=None).shape == args[0].shape


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, hydra_ssm; sys.exit('hydra_ssm.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
