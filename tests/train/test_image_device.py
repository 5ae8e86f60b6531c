"""What a GPU asks of the compared image models: nothing in a step waits for it, or is read from the host.

There is none here. Tensors of the meta device stand for its own: what asks for their values raises, what comes from the
host is seen, and kernels are launched by name alone.
"""

import collections
import contextlib
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("timm")
pytest.importorskip("triton")

from timm.loss import SoftTargetCrossEntropy
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from hydra_ssm.mixer import MatrixMixer
from hydra_ssm.ops import backend
from hydra_ssm.train.image.comparison import ROWS, Plan, compare, loop, prepare
from hydra_ssm.train.image.comparison.augment import Random, Strength, augmented
from hydra_ssm.train.image.comparison.data import Data
from hydra_ssm.train.image.comparison.models import build
from hydra_ssm.train.image.comparison.plan import Job
from hydra_ssm.train.plans import write_plan

FROM_HOST = {"tensor", "as_tensor", "asarray", "scalar_tensor"}
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}


class FromHost(TorchFunctionMode):
    """Names of the functions that make tensors of Python's numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in FROM_HOST:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Devices(TorchDispatchMode):
    """Operations, those that wait for a device, and those with a tensor of the host."""

    def __init__(self):
        super().__init__()
        self.called, self.waits, self.host = collections.Counter(), [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        name = str(operation)
        self.called[name] += 1
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
        by_mask = name.startswith("aten.index") and any(t.dtype == torch.bool for t in tree_leaves(args[1:]) if
                                                        isinstance(t, torch.Tensor))  # fmt: skip
        if name in WAITS or by_mask:
            self.waits.append(name)
        if any(t.device.type == "cpu" for t in tensors):
            self.host.append(name)
        return found


@pytest.fixture
def device(monkeypatch):
    """meta, as if it had kernels."""
    monkeypatch.setattr(backend, "INTERPRETED", True)  # kernels may be asked for where there is no CUDA
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # does not know meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, grid, warmup, **options: None)
    monkeypatch.setattr(GridExecutor, "__call__", lambda launch, *args, **options: None)  # where they are interpreted
    return torch.device("meta")


def on_kernels(model):
    for module in model.modules():
        if isinstance(module, MatrixMixer):
            module.settings = replace(module.settings, impl="triton")
    return model.train()


@pytest.mark.parametrize("row", ROWS)
def test_a_step_waits_for_nothing_and_reads_nothing_from_the_host(row, device):
    """So that it can be captured in a CUDA graph."""
    with device:
        model = on_kernels(build(row, Plan.of("usual", {}), 10, 32))
    x, target = torch.empty(8, 3, 32, 32, device=device), torch.empty(8, 10, device=device)
    with FromHost() as host, Devices() as devices:
        loss = loop.forward(model, x, SoftTargetCrossEntropy(), target)
        loss.backward()
    assert host.found == devices.waits == devices.host == []
    assert devices.called["aten.rand.default"] + devices.called["aten.bernoulli_.float"] > 0  # drop-path was there
    kernels = {"hydra_vit": "block", "hydra_dropin": "block", "add": "quasiseparable_backward"}
    kernels |= dict.fromkeys(("low_rank", "toeplitz"), "short_conv_backward")
    assert row not in kernels or devices.called[f"hydra_ssm.{kernels[row]}.default"] > 0


@pytest.mark.parametrize("name", ["from the host", "a value", "a mask"])
def test_such_a_step_would_be_seen(name, device):
    x = torch.zeros(3, device=device)
    steps = {
        "from the host": lambda: x * torch.tensor([1.0, 2.0, 3.0], device=device),
        "a value": lambda: x / float(x.sum()),
        "a mask": lambda: x[x > 0],
    }
    with FromHost() as host, Devices() as devices, contextlib.suppress(RuntimeError, NotImplementedError):
        steps[name]()
        assert host.found + devices.waits + devices.host
        return
    assert name != "from the host"  # the others have raised


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_on_a_gpu_a_step_is_a_graph_and_its_gradients_are_those_without(row):
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = build(row, Plan.of("usual", {"drop_path": 0.0}), 10, 32).to(device)
    batches = [(torch.randn(16, 3, 32, 32, device=device), torch.randn(16, 10, device=device).softmax(1)) for _ in "ab"]
    criterion = SoftTargetCrossEntropy()
    step = loop.Step(model, criterion, print)
    drawn = torch.cuda.get_rng_state()
    step(*batches[0])
    assert step.graph
    assert torch.equal(drawn, torch.cuda.get_rng_state())
    loss = step(*batches[1])
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    expected = loop.forward(model, batches[1][0], criterion, batches[1][1])
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-3, atol=1e-3)
    for own, parameter in zip(found, model.parameters(), strict=True):
        assert (own - parameter.grad).norm() <= 1e-2 * parameter.grad.norm() + 1e-6


@pytest.mark.gpu
def test_on_a_gpu_models_of_digits_are_compared(tmp_path):
    report = compare(None, tmp_path / "out", size="small", seeds=[0], stages=["speed", "tuning", "runs"])
    assert len(report["runs"]) == len(ROWS)
    assert all(run["graph"] and run["top1"] > 15 for run in report["runs"])
    assert all(row["speed"]["graph"] for row in report["rows"])


def test_augmentation_waits_for_nothing():
    cpu = torch.device("cpu")
    pictures, labels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    strength = Strength(erase=0.5)
    augmented(pictures, labels, 10, strength, Random(0, 0, cpu))  # constants are copied once
    with FromHost() as host, Devices() as devices:
        augmented(pictures, labels, 10, strength, Random(0, 1, cpu))
    assert host.found == devices.waits == []


def test_a_step_of_a_run_waits_for_nothing(tmp_path):
    """Besides torch's optimiser, whose fused form on a GPU does not either."""
    prepare(None, tmp_path / "data")
    plan = Plan.of("small", {"vit_depth": 1})
    write_plan(plan, tmp_path)
    run = loop.Run(plan, Data(tmp_path / "data"), Job("vit", 1e-3, 0, False), print)
    run.optimizer.step = lambda: None
    batches = run._batches(torch.randperm(len(run.train)))
    run._one_step(0, batches[0])
    with FromHost() as host, Devices() as devices:
        run._one_step(1, batches[1])
    assert host.found == devices.waits == []
