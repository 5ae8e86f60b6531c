"""Inputs, errors and clocks that the GPU benchmarks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from hydra_ssm.ops import Documents, Triangle, semiseparable

SHAPES = [(256, 128), (64, 512), (16, 2048), (4, 8192), (1, 32768)]


def inputs(
    batch: int, length: int, heads: int = 24, width: int = 64, state: int = 64, groups: int = 1,
    dtype: torch.dtype = torch.bfloat16, documents: bool = False, strong: float = 1.0, seed: int = 0,
) -> tuple:  # fmt: skip
    """(x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, diagonal) as the layer makes them: slices of one projection."""
    g = torch.Generator("cuda").manual_seed(seed)
    inner, part = heads * width, groups * state

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=g)

    wide = torch.nn.functional.silu(normal(batch, length, inner + 4 * part)).to(dtype)
    x = wide[..., :inner].unflatten(-1, (heads, width))
    features = [wide[..., inner + k * part :][..., :part].unflatten(-1, (groups, state)) for k in range(4)]
    dt = torch.nn.functional.softplus(normal(batch, length, 2 * heads) - 3.0) * strong
    A = -torch.exp(0.5 * normal(heads))
    diagonal = normal(batch, length, heads).to(dtype)
    ids = None
    if documents:
        ids = (torch.rand(batch, length, device="cuda", generator=g) < 0.02).cumsum(1)
    return x, dt[..., :heads], dt[..., heads:], A, *features, ids, diagonal


def eager(args: tuple, dtype: torch.dtype | None = None) -> Tensor:
    """The eager chunked form, in the inputs' precision or with everything in `dtype`."""
    x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, d = args
    if dtype is not None:
        x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, d = (t.to(dtype) for t in (x, dt_f, dt_b, A, B_f, C_f, B_b, C_b, d))
    triangles = [Triangle(dt_f, A, B_f, C_f, strict=True), Triangle(dt_b, A, B_b, C_b, upper=True, strict=True)]
    y = semiseparable(x, triangles, None if ids is None else Documents(ids), impl="chunked")
    return y + x * d[..., None]


def error(a: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN where anything is NaN."""
    return float((a.double() - exact).norm() / exact.norm())


CASES = [
    {"batch": 2, "length": 300},
    {"batch": 1, "length": 1, "heads": 2},
    {"batch": 3, "length": 129, "heads": 4, "groups": 2, "width": 32, "state": 16},
    {"batch": 1, "length": 257, "heads": 2, "width": 128, "state": 64},
    {"batch": 1, "length": 200, "heads": 2, "width": 16, "state": 128, "documents": True},
    {"batch": 2, "length": 300, "strong": 100.0},
    {"batch": 2, "length": 300, "documents": True},
    {"batch": 4, "length": 2048},
]


def accuracy(forward: Callable[..., Tensor], last: int = 100) -> list[dict]:
    """Errors of `forward` and of the eager form, both against float64, fresh inputs and poisoned memory each time."""
    rows = []
    for seed, case in list(enumerate(CASES))[-last:]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            args = inputs(**case, dtype=dtype, seed=seed)
            exact = eager(args, torch.float64)
            poison = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(2)]
            del poison  # what the allocator hands out next holds NaN
            row = {"case": str(case), "dtype": str(dtype)[6:]}
            try:
                first = forward(*args)
                row |= {"error": error(first, exact), "eager": error(eager(args), exact)}
                row["same"] = torch.equal(first, forward(*args))
                row["ok"] = row["error"] <= 2 * row["eager"] and row["same"]
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:160]}"
            rows.append(row)
    return rows


NAMES = ("x", "dt_f", "dt_b", "A", "B_f", "C_f", "B_b", "C_b", "diagonal")


def eager_gradients(args: tuple, dy: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients of NAMES through the eager form."""
    if dtype is not None:
        args = tuple(t if k == 8 or t is None else t.to(dtype) for k, t in enumerate(args))
        dy = dy.to(dtype)
    leaves = tuple(t if k == 8 else t.detach().requires_grad_() for k, t in enumerate(args))
    wanted = [t for k, t in enumerate(leaves) if k != 8]
    return list(torch.autograd.grad(eager(leaves), wanted, dy))


def gradient_accuracy(backward: Callable[..., tuple], last: int = 100) -> list[dict]:
    """Errors of every gradient and of the eager form's, against float64."""
    rows = []
    for seed, case in list(enumerate(CASES))[-last:]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            args = inputs(**case, dtype=dtype, seed=seed)
            dy = torch.randn_like(args[0])
            row: dict = {"case": str(case), "dtype": str(dtype)[6:]}
            try:
                exact = eager_gradients(args, dy, torch.float64)
                poison = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(2)]
                del poison
                ours = backward(dy, *args)
                row["same"] = all(torch.equal(a, b) for a, b in zip(ours, backward(dy, *args), strict=True))
                theirs = eager_gradients(args, dy)
                errors = {}
                for name, a, b, e in zip(NAMES, ours, theirs, exact, strict=True):
                    if float(e.norm()) > 0:
                        errors[name] = (error(a, e), error(b, e))
                    else:
                        errors[name] = (float(a.double().norm()), float(b.double().norm()))
                row["errors"] = errors
                row["error"] = max(v[0] for v in errors.values())
                row["worst"] = {k: f"{v[0]:.1e}/{v[1]:.1e}" for k, v in errors.items() if not v[0] <= 2 * v[1] + 1e-12}
                row["A"] = errors["A"][0]
                row["ok"] = row["same"] and not row["worst"]
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {str(problem)[:160]}"
            rows.append(row)
    return rows


def graph_time(f: Callable[[], object], warmup: int = 5, rep: int = 40) -> float:
    """Median microseconds of a CUDA graph's replay of f, the L2 cache flushed in between."""
    f()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return 1000 * triton.testing.do_bench(graph.replay, warmup=warmup, rep=rep, return_mode="median")


def machine() -> dict:
    """Device, versions and the two measured ceilings."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = 1000 * triton.testing.do_bench(lambda: b.copy_(a), return_mode="median")
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 1000 * triton.testing.do_bench(lambda: m @ m, return_mode="median")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_TB_s": 2 * a.numel() / copy / 1e6,
        "bf16_TFLOP_s": 2 * 8192**3 / product / 1e6,
    }
