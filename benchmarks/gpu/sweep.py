"""Time each kernel of the layer in several configurations, at the sizes of the base model: which is the best where.

    python benchmarks/gpu/sweep.py --jobs 14                          # all kernels, 16 x 2,048
    python benchmarks/gpu/sweep.py states output --shapes 1x32768 256x128 --json sweep.json

Compilation is spread over processes that share Triton's cache; then everything is timed in this one, replayed as a CUDA
graph with a cold L2 cache. Whether results are right is accuracy.py's question. `--device cpu` runs every kernel once
through the interpreter, on small tensors, without a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hydra_ssm.bench.clock import captured, on_gpu
from hydra_ssm.bench.machine import facts
from hydra_ssm.ops.triton import conv, norm
from hydra_ssm.ops.triton.conv import conv_backward, conv_forward
from hydra_ssm.ops.triton.decay import Steps, chunk_decays
from hydra_ssm.ops.triton.feature_grads import FeatureGradsConfig, StateSums, feature_grads
from hydra_ssm.ops.triton.norm import norm_backward, norm_forward
from hydra_ssm.ops.triton.output import OutputConfig, chunk_outputs
from hydra_ssm.ops.triton.states import StatesConfig, chunk_states
from hydra_ssm.ops.triton.step_grads import StepGrads, step_grads
from hydra_ssm.ops.triton.value_grads import TileSums, ValueGradsConfig, value_grads

HEADS, WIDTH, STATE = 24, 64, 64
SMALL = 2, 16, 16  # of these, for the interpreter
Variant = tuple[int, Any]  # chunk length (0 where there are no chunks), configuration


def _of(base: Any, *chunks: int, **axes: tuple) -> list[Variant]:
    """The configuration as it is, then all combinations of the values given."""
    some = [replace(base, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    return [(Q, how) for Q in chunks or (0,) for how in dict.fromkeys([base, *some])]


VARIANTS: dict[str, list[Variant]] = {
    "conv": _of(conv.FORWARD, rows=(32, 64, 128), channels=(128, 256), unroll=(4, 8), warps=(1, 2)),
    "conv backward": _of(conv.BACKWARD, rows=(64, 128, 256), channels=(64, 128), unroll=(4, 8), warps=(1, 2)),
    "norm": _of(norm.FORWARD, elements=(2048, 4096), warps=(2, 4, 8)),
    "norm backward": _of(norm.BACKWARD, programs=(264, 528, 1056), warps=(4, 8), stages=(1, 2)),
    "decays": [(Q, None) for Q in (64, 128)],
    "states": _of(StatesConfig(), 64, 128, stretch=(0, 32), warps=(4, 8), stages=(2, 3)),
    "adjoint": _of(StatesConfig(), 64, stretch=(0, 32), warps=(4, 8), stages=(2, 3)),
    "output": [
        *_of(OutputConfig(HEADS, 128, False, 8, 4), 128, stages=(2, 3)),
        *_of(OutputConfig(HEADS, 64, True, 4, 3), 64, heads=(8, HEADS), stages=(2, 4)),
    ],
    "feature": _of(FeatureGradsConfig(), 64, warps=(4, 8), stages=(1, 2, 3, 4)),
    "value": _of(ValueGradsConfig(), 64, warps=(4, 8), stages=(1, 2, 3)),
    "steps": [(64, None)],
}


class Problem:
    """One shape's tensors, and what the kernels before have made of them, once for each chunk length."""

    def __init__(self, batch: int, length: int, device: str) -> None:
        self.sizes = (HEADS, WIDTH, STATE) if device != "cpu" else SMALL
        H, P, N = self.sizes
        inner, dtype = H * P, torch.bfloat16 if device != "cpu" else torch.float16
        channels = inner + 4 * N

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device)

        self.projected = normal(batch, length, inner + channels + 2 * H).to(dtype)
        self.dprojected = torch.empty_like(self.projected)
        self.xBC, self.dxBC = (torch.nn.functional.silu(normal(batch, length, channels)).to(dtype) for _ in range(2))
        self.y, self.dy = (normal(batch, length, inner).to(dtype) for _ in range(2))
        self.rstd, self.norm = normal(batch, length), normal(inner)
        self.conv, self.conv_bias, self.fc_D = normal(channels, 1, 7), normal(channels), normal(H, inner).to(dtype)
        self.steps = Steps(*self.parts(self.projected)[2:], 0.5 * normal(H), normal(H) - 3.0)
        self.diagonal = normal(batch, length, H).to(dtype)
        self.made: dict[int, tuple] = {}

    def parts(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """z, what passes the convolution, dt_f and dt_b."""
        H, P, N = self.sizes
        return t.split([H * P, H * P + 4 * N, H, H], dim=-1)

    def values(self, t: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """x and the features."""
        H, P, N = self.sizes
        x, *features = t.split([H * P] + [N] * 4, dim=-1)
        return x.unflatten(-1, (H, P)), tuple(f.unflatten(-1, (1, N)) for f in features)

    def before(self, Q: int) -> tuple:
        """(decays, S, T) in chunks of Q tokens; those of other chunks are thrown away."""
        if Q not in self.made:
            self.made.clear()
            x, features = self.values(self.xBC)
            B_f, C_f, B_b, C_b = features
            dy = self.dy.unflatten(-1, x.shape[2:])
            decays = chunk_decays(self.steps, None, self.diagonal, Q, True)
            S = chunk_states(B_f, B_b, x, decays, None, Q, StatesConfig(), "ieee", False)
            T = chunk_states(C_f, C_b, dy, decays, None, Q, StatesConfig(), "ieee", True)
            self.made[Q] = decays, S, T
        return self.made[Q]

    def call(self, kernel: str, Q: int, how: Any) -> Callable[[], object]:
        """What launches one kernel."""
        return self._around(kernel, how) if Q == 0 else self._of_product(kernel, Q, how)

    def _around(self, kernel: str, how: Any) -> Callable[[], object]:
        (z, wet, *_), (dz, dwet, *_) = self.parts(self.projected), self.parts(self.dprojected)
        x, _ = self.values(self.xBC)
        return {
            "conv": lambda: conv_forward(wet, self.conv, self.conv_bias, None, True, how),
            "conv backward": lambda: conv_backward(self.dxBC, wet, self.conv, self.conv_bias, None, True, dwet, how),
            "norm": lambda: norm_forward(self.y, z, self.norm, 1e-5, how),
            "norm backward": lambda: norm_backward(self.dy, self.y, z, self.norm, self.rstd, self.dy, dz, x, how),
        }[kernel]

    def _of_product(self, kernel: str, Q: int, how: Any) -> Callable[[], object]:
        decays, S, T = self.before(Q)
        (x, features), (dx, grads) = self.values(self.xBC), self.values(self.dxBC)
        B_f, C_f, B_b, C_b = features
        dy = self.dy.unflatten(-1, x.shape[2:])

        back = self.diagonal, self.fc_D
        sums, tiles = StateSums.of(decays), TileSums.of(decays, False, False, over=False)

        def feature(how: FeatureGradsConfig) -> Any:
            return feature_grads(x, dy, features, decays, None, S, T, sums, Q, how, "ieee")

        def value(through: Any, how: ValueGradsConfig) -> Any:
            return value_grads(x, dy, features, decays, None, T, through, dx, grads, tiles, Q, how, "ieee", back)

        if kernel in ("value", "steps"):
            through = feature(FeatureGradsConfig())
            value(through, ValueGradsConfig())
            of_steps = StepGrads.of(self.steps, None, Q, None, None)
        return {
            "decays": lambda: chunk_decays(self.steps, None, self.diagonal, Q, True),
            "states": lambda: chunk_states(B_f, B_b, x, decays, None, Q, how, "ieee", False),
            "adjoint": lambda: chunk_states(C_f, C_b, dy, decays, None, Q, how, "ieee", True),
            "output": lambda: chunk_outputs(x, features, decays, None, S, Q, how, "ieee"),
            "feature": lambda: feature(how),
            "value": lambda: value(through, how),
            "steps": lambda: step_grads(self.steps, None, tiles, sums, Q, of_steps),
        }[kernel]


def measured(problem: Problem, kernel: str, variant: Variant) -> float | str:
    """Median microseconds, or why there are none."""
    try:
        device = problem.y.device
        return 1e6 * statistics.median(on_gpu(captured(problem.call(kernel, *variant), device), device, budget=0.02))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def warm(kernels: list[str], device: str, job: int, jobs: int) -> None:
    """Compile every jobs-th variant by running it once."""
    problem = Problem(1, 1024 if device != "cpu" else 70, device)
    todo = [(kernel, *variant) for kernel in kernels for variant in VARIANTS[kernel]]
    if device == "cpu":  # one of each, as they are
        todo = [(kernel, *VARIANTS[kernel][0]) for kernel in kernels]
        todo = [(k, Q and 32, replace(how, heads=2, rows=32) if k == "output" else how) for k, Q, how in todo]
    for kernel, Q, how in todo[job::jobs]:
        try:
            problem.call(kernel, Q, how)()
        except Exception as error:
            print(kernel, Q, how, type(error).__name__, str(error)[:100], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", help=f"of {', '.join(VARIANTS)}; none: all")
    parser.add_argument("--shapes", nargs="+", default=["16x2048"], help="batch x length")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write all times there")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    kernels = given.kernels or list(VARIANTS)
    if unknown := set(kernels) - set(VARIANTS):
        parser.error(f"kernels must be among {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    if given.job is not None or given.device == "cpu":
        return warm(kernels, given.device, given.job or 0, given.jobs)
    begin = time.time()
    here = [sys.executable, __file__, *kernels, "--jobs", str(given.jobs), "--job"]
    for worker in [subprocess.Popen([*here, str(k)]) for k in range(given.jobs)]:
        worker.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    found: list[dict] = []
    for shape in given.shapes:
        batch, length = map(int, shape.split("x"))
        problem = Problem(batch, length, given.device)
        for kernel in kernels:
            rows = [(measured(problem, kernel, variant), *variant) for variant in VARIANTS[kernel]]
            found += [{"kernel": kernel, "shape": shape, "chunk": Q, "how": str(how), "us": t} for t, Q, how in rows]
            for t, Q, how in sorted(rows, key=lambda row: (isinstance(row[0], str), row[0]))[:6]:
                print(f"{kernel:18}{shape:>10}{Q or '':>5} {t if isinstance(t, str) else f'{t:8.1f}'}  {how or ''}")
    print(f"{time.time() - begin:.0f} s")
    if given.json:
        given.json.write_text(json.dumps({"machine": facts(torch.device(given.device)), "times": found}) + "\n")


if __name__ == "__main__":
    main()
