"""What a CUDA graph needs of a training step: no operation reads values to the host, or brings any from there."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hydra_ssm.matrices import MATRICES, vandermonde
from hydra_ssm.matrices.fusion import fused
from hydra_ssm.matrices.vandermonde import Vandermonde, at_most
from hydra_ssm.text import HydraForMaskedLM
from hydra_ssm.train.ablation import Plan, all_rows
from hydra_ssm.train.ablation.models import config
from hydra_ssm.train.batches import Batch
from hydra_ssm.train.loop import Course, NotFinite, Training
from hydra_ssm.train.trainee import LARGEST, How, Means, Trainee

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
    with at_most(LARGEST):
        y = matrix @ x
        again = matrix @ x
    assert torch.allclose(y, exact, rtol=1e-9, atol=1e-9)
    assert torch.equal(y, again)
    for found, wanted in zip(*(torch.autograd.grad(t.square().sum(), (q, k)) for t in (y, exact)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-7, atol=1e-7)


def test_beyond_the_bound_vandermonde_is_nan_and_not_a_little_wrong() -> None:
    q, k, x = torch.randn(1, 32, 1, 4), torch.randn(1, 32, 1, 4), torch.randn(1, 32, 1, 4)
    with at_most(8.0):
        assert (Vandermonde(None, q, k, 1.0) @ x).isfinite().all()
        q[0, 5, 0, 2] = 8.1
        assert (Vandermonde(None, q, k, 1.0) @ x).isnan().all()
    assert (Vandermonde(None, q, k, 1.0) @ x).isfinite().all()


def test_a_loss_that_the_bound_may_have_made_nan_says_so(tmp_path: Path) -> None:
    course = Course("its name", 1, 1e-3, 0.01, 1.0, 0, 1, evaluate_first=False, batch_tokens=32, save_after=60.0)
    training = Training(course, [], {}, model("vandermonde"), tmp_path, How(), print)  # type: ignore[arg-type]
    found = {}
    for row in ("vandermonde", "cauchy"):
        training.trainee, training.done, training.logged = trainee(row), 1, 0
        training.trainee.means = lambda _: Means(math.nan, 0.0)  # type: ignore[method-assign]
        with pytest.raises(NotFinite, match="by step 1, its loss is nan") as error:
            training._log()
        found[row] = str(error.value)
    assert "or a feature of vandermonde is beyond 64" in found["vandermonde"]
    assert "beyond" not in found["cauchy"]


def test_without_a_graph_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    said: list[str] = []
    made = trainee("vandermonde")
    made.say = said.append
    with made._settings():
        assert vandermonde._bound == LARGEST
    monkeypatch.setattr("hydra_ssm.train.trainee.captured", fails)
    monkeypatch.setattr("hydra_ssm.train.trainee.renew_generator", lambda _: None)
    made._capture()
    assert said == ["no CUDA graph, training is slower: RuntimeError: operation not permitted when stream is capturing"]
    assert not made.graph
    with made._settings():
        assert vandermonde._bound is None


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
