"""What a training step of the Hydra layer holds in memory at most, and what is written over what."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hydra_ssm import Hydra
from hydra_ssm.ops import last_linear

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # of the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 128


def most_held(run: Callable[[], object]) -> int:
    """Bytes asked of torch's allocator beyond those before. On a CPU the kernels do not run: they allocate nothing."""
    run()  # what is made once
    if DEVICE == "cuda":
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        run()  # a block that is given may be a megabyte larger than what was asked for: that is no layer's
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture
def bytes_a_token(monkeypatch) -> Callable[..., float]:
    """(one shape, a larger one, options) -> what a step of a layer holds more for each token that is more."""
    import hydra_ssm.ops.linear as linear
    import hydra_ssm.ops.triton.block as block

    monkeypatch.setattr(block, "RECOMPUTED", 512)
    monkeypatch.setattr(block, "OF_ONE", 1024)
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
        # A GPU multiplies what it has in 16 bit, and keeps the product in 32.
        for user in (block, linear):
            monkeypatch.setattr(user, "product", lambda a, b: (a @ b).float())

    def step(batch: int, length: int, options: dict) -> int:
        layer = Hydra(D, impl="triton", **options).to(DEVICE)
        u, dy = (torch.randn(batch, length, D, device=DEVICE).bfloat16() for _ in range(2))
        u.requires_grad_()
        # Half of the tokens' adjoint states at once.
        monkeypatch.setattr("hydra_ssm.ops.triton.plan.HELD", batch * length // 2)

        def run() -> None:
            with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
                y = layer(u)
            y.backward(dy)
            u.grad = None
            layer.zero_grad()

        return most_held(run)

    def found(one: tuple[int, int], other: tuple[int, int], **options) -> float:
        more = step(*other, options) - step(*one, options)
        return more / (other[0] * other[1] - one[0] * one[1])

    return found


H, INNER, FEATURES = D // 32, 2 * D, 4 * 64
OUT, XBC, Y, T = 2 * D, 2 * (INNER + FEATURES), 2 * INNER, 4 * INNER  # bytes a token; as many of S, in chunks of 64
PROJECTED = 2 * (2 * INNER + FEATURES + 2 * H)
DECAYS = (16 + 4 + 8 / 64) * H + 4  # with the diagonal and the norm's scale


def test_a_step_holds_what_the_page_says(bytes_a_token) -> None:
    """y and its gradient in one place, x, B, C and theirs in one place, S, half of T, and what is small."""
    small = (
        4 * FEATURES / 2 + 16 * H + 2 * H
    )  # parts for half of the tokens, sums along the states, the diagonal's gradient
    found = bytes_a_token((8, 512), (16, 512))
    assert found == pytest.approx(OUT + PROJECTED + XBC + Y + 1.5 * T + DECAYS + small, rel=0.01)


def test_a_step_that_recomputes_holds_no_more_than_its_forward_pass(bytes_a_token) -> None:
    """The projection, x, B, C, y, which is normed where it is, and half of the states: chunks are of 128 tokens."""
    found = bytes_a_token((16, 512), (32, 512), recompute=True)
    assert found == pytest.approx(PROJECTED + XBC + Y + T / 2 + DECAYS, rel=0.01)


def test_a_long_row_that_is_computed_again_has_neither_y_nor_states_at_once(bytes_a_token) -> None:
    """The projection, x, B and C, the decays, the gradient of y in the place of what it is found from, the output.

    And sums along the states, an eighth of these, their adjoints and what passes through them.
    """
    borders = 2 * 2 * 4 * INNER * 64 / 1024  # of S and of T, in both directions, float32, for each part
    found = bytes_a_token((1, 8192), (1, 16384), recompute=True)
    part = (2 * T + 4 * FEATURES) / 8
    assert found == pytest.approx(OUT + PROJECTED + XBC + Y + DECAYS + 18 * H + borders + part, rel=0.01)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 16384), (4, 16384), (12, 49152)])
def test_adjoint_states_are_there_for_16384_tokens_or_half_of_a_larger_batch(batch, tokens) -> None:
    from hydra_ssm.ops.triton.plan import plan

    x, B = (torch.empty(batch, 8192, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (24, 1))
    how = plan(x, B, backward=True)
    assert how.held * how.chunk == tokens


class Linear:
    """A linear layer of a tensor that was computed, and what its backward pass gives."""

    def __init__(self, bias: bool = True) -> None:
        self.layer = nn.Linear(8, 5, bias=bias, device=DEVICE)
        self.root = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)
        self.leaves = [self.root, *self.layer.parameters()]

    def __call__(self, last: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        u = (self.root * 2).to(dtype)
        return u, last_linear(u, self.layer.weight, self.layer.bias) if last else self.layer(u)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_linear_map_of_what_nobody_else_reads_is_a_linear_map(bias, autocast) -> None:
    found, linear = [], Linear(bias=bias)
    for last in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            _, y = linear(last, torch.bfloat16 if autocast else torch.float32)
        found.append((y, *torch.autograd.grad((y * y.detach().float().sin()).sum(), linear.leaves)))
    for name, a, b in zip(("y", "u", "weight", "bias"), *found, strict=False):
        assert a.dtype == b.dtype
        if autocast and name in ("weight", "bias"):  # torch's are rounded to 16 bits before they are float32
            torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-5)
        else:
            assert torch.equal(a, b)


def test_weights_of_another_class_of_tensors_are_left_to_it() -> None:
    class Other(Tensor):
        pass

    weight = torch.randn(5, 8, device=DEVICE).as_subclass(Other).requires_grad_()
    u = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True) * 2
    y = last_linear(u, weight, None)
    assert type(y) is Other
    assert type(y.grad_fn).__name__ != "_LinearBackward"


def test_a_second_derivative_through_its_gradient_knows_the_weight() -> None:
    found, linear = [], Linear()
    for last in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16):
            u, y = linear(last, torch.bfloat16)
        (du,) = torch.autograd.grad(y.float().square().sum(), u, create_graph=True)
        found.append(torch.autograd.grad(du.float().square().sum(), linear.layer.weight)[0])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_its_gradient_lies_where_the_values_were_unless_they_are_needed_again() -> None:
    for last in (False, True):
        u, y = (linear := Linear())(True)
        (du,) = torch.autograd.grad(y.sum(), u, retain_graph=not last)
        assert (du.data_ptr() == u.data_ptr()) == last
        torch.testing.assert_close(du, linear.layer.weight.sum(0).expand_as(du))
    u, y = Linear()(True)
    (dw,) = torch.autograd.grad(y.square().sum(), y.grad_fn.next_functions[1][0].variable, create_graph=True)
    torch.autograd.grad(dw.square().sum(), u)


def test_who_looks_at_the_gradient_of_what_out_proj_reads_keeps_it() -> None:
    mixer = Hydra(16, d_state=16, headdim=16, d_conv=3, impl="triton").to(DEVICE)
    u, seen = torch.randn(1, 7, 16, device=DEVICE), []
    mixer.out_proj.register_full_backward_hook(lambda _, given, __: seen.append((given[0], given[0].clone())))
    mixer(u.requires_grad_()).square().sum().backward()
    assert torch.equal(*seen[0])
