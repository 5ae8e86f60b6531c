"""What a CUDA graph needs of a training step: no operation reads values to the host, or brings any from there."""

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_ssm.bench import clock
from hydra_ssm.matrices import MATRICES
from hydra_ssm.matrices.fusion import fused
from hydra_ssm.matrices.vandermonde import Vandermonde
from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.text.collators import IGNORED
from hydra_ssm.train.ablation import Plan, all_rows
from hydra_ssm.train.ablation.models import config
from hydra_ssm.train.batches import Batch
from hydra_ssm.train.loop import Course, NotFinite, Training
from hydra_ssm.train.replay import replayed
from hydra_ssm.train.trainee import LARGEST, How, Means, Trainee
from hydra_ssm.train.workers import Until

META = torch.device("meta")  # whose tensors have no values: to read one raises


class FromHost(TorchDispatchMode):
    """Collects operations that have a tensor of the host among theirs; numbers in the form of one are no copies."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.found = 0, []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = f(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), result))
        copied = [t for t in given if t.device.type == "cpu" and (t.ndim or "copy" in str(f))]
        self.count += 1
        if copied or any(t.device.type == "cpu" for t in made):
            self.found.append(str(f))
        return result


def model(row: str, length: int = 16) -> HydraForMaskedLM:
    plan = Plan.of("small", {"layers": 1, "d_model": 16, "headdim": 4, "length": length, "unmatched": True})
    return HydraForMaskedLM(config(plan, row, 64))


def trainee(row: str, length: int = 16) -> Trainee:
    """A model without values, as on a GPU that is to capture it, but for kernels in Triton."""
    with META:
        net = model(row, length)
    made = Trainee(net, 1e-3, 0.01, 1.0, META, How(compile=False), print)
    made._bound(LARGEST)
    net.train()
    numbers = {"dtype": torch.long, "device": META}
    ids, places = torch.zeros(2, length, **numbers), torch.zeros(8, **numbers)
    made._batch = Batch(ids, places, places, torch.ones((), device=META))
    return made


@pytest.mark.parametrize("row", all_rows())
def test_a_step_of_every_row_can_be_captured(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    made = trainee(row)
    with FromHost() as seen:
        made._forward_and_backward()
    assert seen.count > 100
    assert seen.found == []
    assert all(p.grad is not None for p in made.net.model.encoder.parameters())


def test_what_cannot_be_captured_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    multiply = MATRICES["toeplitz"].multiply
    ways = {
        "from the host": lambda self, x: multiply(self, x * torch.tensor([2.0]).to(x.device)),
        "a number from the host": lambda self, x: multiply(self, x * torch.tensor(2.0).to(x.device)),
    }
    for way in ways.values():
        monkeypatch.setattr(MATRICES["toeplitz"], "multiply", way)
        with FromHost() as seen:
            trainee("toeplitz")._forward_and_backward()
        assert seen.found
    monkeypatch.setattr(MATRICES["toeplitz"], "multiply", lambda self, x: multiply(self, x * float(x.detach().max())))
    with pytest.raises(RuntimeError, match="meta tensors"):
        trainee("toeplitz")._forward_and_backward()


@pytest.mark.parametrize("length", [1, 2, 17, 128])
def test_vandermonde_needs_no_look_at_features_of_a_known_bound(length: int) -> None:
    q, k = (3 * torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(2, length, 3, 5, dtype=torch.float64)
    matrix = Vandermonde(None, q, k, 0.3)
    exact = torch.einsum("bhij,bjhp->bihp", matrix.dense(), x)
    y = replace(matrix, largest=LARGEST) @ x
    assert torch.allclose(y, exact, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(*(torch.autograd.grad(t.square().sum(), (q, k)) for t in (y, exact)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-7)


def test_beyond_the_bound_vandermonde_is_nan_and_not_a_little_wrong() -> None:
    q, k, x = torch.randn(1, 32, 1, 4), torch.randn(1, 32, 1, 4), torch.randn(1, 32, 1, 4)
    assert (Vandermonde(None, q, k, 1.0, largest=8.0) @ x).isfinite().all()
    q[0, 5, 0, 2] = 8.1
    assert (Vandermonde(None, q, k, 1.0, largest=8.0) @ x).isnan().all()
    assert (Vandermonde(None, q, k, 1.0) @ x).isfinite().all()


def test_a_loss_that_the_bound_may_have_made_nan_says_so(tmp_path: Path) -> None:
    course = Course("its name", 1, 1e-3, 0.01, 1.0, 0, 1, evaluate_first=False, batch_tokens=32, save_after=60.0)
    training = Training(course, [], {}, model("vandermonde"), tmp_path, How(), print)  # type: ignore[arg-type]
    found = {}
    for row in ("vandermonde", "cauchy"):
        training.trainee, training.done, training.logged = trainee(row), 1, 0
        training.trainee.graph = True
        training.trainee.means = lambda _: Means(math.nan, 0.0)  # type: ignore[method-assign]
        with pytest.raises(NotFinite, match="by step 1, its loss is nan") as error:
            training._log()
        found[row] = str(error.value)
    assert "or a feature of vandermonde is beyond 64" in found["vandermonde"]
    assert "beyond" not in found["cauchy"]


@pytest.mark.parametrize("problem", [RuntimeError, torch.OutOfMemoryError])
def test_a_capture_that_fails_disturbs_nothing_that_comes_after(
    problem: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it fails of; where memory is short the run fails, else it goes on without a graph."""
    own, after, said = MagicMock(), [], []
    for name in ("stream", "device", "current_device", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(clock, "_side_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: own)
    monkeypatch.setattr(torch.cuda, "graph", MagicMock(side_effect=problem("stream is capturing\nmore")))
    monkeypatch.setattr(torch.cuda, "set_stream", after.append)
    monkeypatch.setattr(clock, "_renew_generator", after.append)
    device, steps = torch.device("cuda", 0), []
    with pytest.raises(problem) if problem is torch.OutOfMemoryError else nullcontext():
        step, graph = replayed(lambda: steps.append(1), device, said.append)
        step()
        assert not graph
        assert said == ["no CUDA graph, training is slower: stream is capturing more"]
    assert after == [own, device]
    assert len(steps) == (2 if problem is torch.OutOfMemoryError else 3)


def test_without_a_graph_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(step: Callable[[], object], *_: Any) -> tuple[Callable[[], object], bool]:
        step()
        return step, False

    made, seen = trainee("vandermonde"), []
    (mixer,) = made._mixers(Vandermonde)
    made._compute = made._forward_and_backward = lambda: seen.append(mixer.settings.largest)  # type: ignore[method-assign]
    made.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Trainee, "_put", lambda *_: None)
    monkeypatch.setattr("hydra_ssm.train.trainee.replayed", fails)
    made.warm_up(batch(0, 1)[0])
    made._compute()
    assert seen == [LARGEST, LARGEST, None]
    assert not made.graph
    assert made.doubt() == ""


def on_gpu(graph: bool, dropout: float, compile: bool = False) -> Trainee:
    """A model with values, ready for steps."""
    torch.manual_seed(0)
    given = config(Plan.of("small", {"layers": 2, "length": 16, "unmatched": True}), "quasiseparable", 64)
    given.embedding_dropout = given.hidden_dropout = dropout
    made = Trainee(
        HydraForMaskedLM(given), 1e-3, 0.01, 0.5, torch.device("cuda"), How(graph=graph, compile=compile), print
    )
    made.warm_up(batch(0, 1)[0])
    assert made.graph == graph
    return made


def batch(step: int, parts: int) -> list[Batch]:
    """Of 4 rows a part, a third of whose tokens are hidden; the last place is no token's."""
    numbers = torch.Generator().manual_seed(step)
    found = []
    for _ in range(parts):
        ids = torch.randint(5, 64, (4, 16), generator=numbers)
        places = torch.randperm(64, generator=numbers)[:24]
        labels = torch.randint(5, 64, (24,), generator=numbers)
        labels[-1] = IGNORED
        found.append(Batch(ids, places, labels, torch.tensor(23.0 * parts)))
    return found


def trained(made: Trainee, parts: int, steps: range = range(5)) -> tuple[list[float], list[Tensor]]:
    """(the loss of each step, the weights after the last)."""
    losses = []
    for step in steps:
        made.step(batch(step, parts), 1e-3, seed=step)
        losses.append(made.means(1).loss)
    return losses, [p.detach().clone() for p in made.net.parameters()]


def assert_alike(one: tuple[list[float], list[Tensor]], other: tuple[list[float], list[Tensor]]) -> None:
    """But for sums in bfloat16 of another order: a step moves no weight further than its rate."""
    assert one[0] == pytest.approx(other[0], rel=2e-3)
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(one[1], other[1], strict=True)])
    assert moved.mean() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_replayed_steps_are_the_eager_steps(parts: int) -> None:
    assert_alike(*(trained(on_gpu(graph, 0.0), parts) for graph in (True, False)))


@pytest.mark.gpu
def test_parts_of_a_replayed_step_are_added_up() -> None:
    made = on_gpu(True, 0.0)
    made.clip = 0.0
    own = batch(0, 2)
    sums = [torch.zeros_like(p) for p in made.net.parameters()]
    for part in own:
        made._put(part)
        made._compute()
        for total, parameter in zip(sums, made.net.parameters(), strict=True):
            total += parameter.grad
    made.step(own, 0.0, seed=0)
    assert any(total.abs().max() > 0 for total in sums)
    for total, parameter in zip(sums, made.net.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, total, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_dropout_in_a_replay_follows_from_the_seed_of_the_step(compile: bool) -> None:
    made = on_gpu(True, 0.3, compile)
    losses = []
    for seed in (1, 1, 2):
        made.step(batch(0, 1), 0.0, seed)  # a rate of 0 leaves the weights
        losses.append(made.means(1).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


@pytest.mark.gpu
def test_a_replayed_run_that_is_saved_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    class Drawn:
        def __getitem__(self, step: int) -> list[Batch]:
            return batch(step, 2)

    def training(folder: str) -> Training:
        course = Course("a run", 6, 1e-3, 0.01, 0.5, 0, 1, evaluate_first=False, batch_tokens=128, save_after=60.0)
        torch.manual_seed(0)
        net = HydraForMaskedLM(config(Plan.of("small", {"layers": 2, "length": 16}), "quasiseparable", 64))
        (tmp_path / folder).mkdir(exist_ok=True)
        return Training(course, Drawn(), {}, net, tmp_path / folder, How(compile=False), print)  # type: ignore[arg-type]

    whole, stopped, over = training("whole"), training("stopped"), threading.Event()
    assert whole.fit(Until(over, math.inf))
    assert not stopped.fit(Until(over, 0.0))  # after one step
    again = training("stopped")
    assert again.fit(Until(over, math.inf))
    assert again.graph
    found = [([loss for _, loss, _ in t.training], [*t.trainee.net.parameters()]) for t in (whole, again)]
    assert [step for step, *_ in again.training] == [*range(1, 7)]
    assert_alike(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cauchy", "vandermonde"])
def test_fused_products_are_the_same_products(name: str) -> None:
    q, k, x = (torch.randn(2, 16, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    own = {"c": torch.tensor(0.5)} if name == "cauchy" else {}
    matrix = MATRICES[name](None, q, k, scale=0.3, **own)
    found = []
    for way in (nullcontext, fused):
        with way():
            y = matrix @ x
            found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, x))))
    for plain, compiled in zip(*found, strict=True):
        assert torch.allclose(compiled, plain, rtol=1e-12, atol=1e-12)
