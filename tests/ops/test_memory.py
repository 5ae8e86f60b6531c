"""What a training step of the Hydra layer holds in memory at most, and what is written over what."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hydra_ssm import Hydra
from hydra_ssm.bench.clock import peak_bytes
from hydra_ssm.ops import last_linear

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # of the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def most_held(run: Callable[[], object], monkeypatch) -> int:
    """Bytes of torch's allocator beyond those before. On a CPU the kernels do not run: they allocate nothing."""
    run()  # what is made once
    if DEVICE == "cuda":
        return peak_bytes(run, torch.device(DEVICE))
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
    """(batch, length, options) -> what a step of the base model holds, less what no token adds to."""
    import hydra_ssm.ops.triton.block as block

    monkeypatch.setattr(block, "RECOMPUTED", 512)
    monkeypatch.setattr(block, "OF_ONE", 64)
    if DEVICE == "cpu":
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: None)
        # A GPU multiplies what it has in 16 bit, and keeps the product in 32.
        monkeypatch.setattr(block, "_product", lambda a, b: (a @ b).float())

    def step(batch: int, length: int, options: dict) -> int:
        layer = Hydra(768, impl="triton", **options).to(DEVICE)
        u, dy = (torch.randn(batch, length, 768, device=DEVICE).bfloat16() for _ in range(2))
        u.requires_grad_()
        # Half of the tokens' adjoint states at once.
        monkeypatch.setattr("hydra_ssm.ops.triton.plan.HELD", batch * length // 2)

        def run() -> None:
            with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
                y = layer(u)
            y.backward(dy)
            u.grad = None
            layer.zero_grad()

        return most_held(run, monkeypatch)

    def found(batch: int, length: int, **options) -> float:
        return (step(2 * batch, length, options) - step(batch, length, options)) / (batch * length)

    return found


def test_a_step_holds_what_the_page_says(bytes_a_token) -> None:
    """y and its gradient in one place, x, B, C and theirs in one place, S, half of T, and what is small."""
    kept = 6752 + 3584 + 3072 + 6144 + 483 + 4
    assert bytes_a_token(6, 512) < 1.01 * (kept + 1536 + 3072 + 512 + 2 * 384 + 48)


def test_a_step_that_recomputes_holds_the_projection_and_what_it_is_multiplied_with(bytes_a_token) -> None:
    """In the forward pass: the projection, x, B, C, half of the states, as its chunks are of 128 tokens, and y."""
    assert bytes_a_token(6, 512, recompute=True) < 1.01 * (6752 + 3584 + 3072 + 3072 + 483)


def test_a_long_row_that_is_computed_again_has_neither_y_nor_states_at_once(bytes_a_token) -> None:
    """The projection, x, B and C, the decays, the gradient of y in the place of what it is found from, and y."""
    borders = 2 * 2 * 4 * 24 * 64 * 64 / 64  # of S and of T, one for each part of 64 tokens, float32
    found = bytes_a_token(1, 2048, recompute=True)
    assert found < 1.01 * (6752 + 3584 + 483 + 4 + 1536 + 3072 + 48 + borders)


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
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


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
