"""Check and time the product's kernels over shapes and configurations: one call, JSON to --out, a table at the end.

Compilation is spread over processes (--jobs) that share Triton's cache; then everything is measured in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import SHAPES, accuracy, gradient_accuracy, graph_time, inputs, machine

import hydra_ssm.ops.triton.step_grads as step_grads_module
from hydra_ssm.ops.triton import decay
from hydra_ssm.ops.triton.decay import Steps, chunk_decays
from hydra_ssm.ops.triton.feature_grads import FeatureGradsConfig, feature_grads
from hydra_ssm.ops.triton.output import OutputConfig, chunk_outputs
from hydra_ssm.ops.triton.plan import Plan
from hydra_ssm.ops.triton.product import quasiseparable_backward, quasiseparable_forward
from hydra_ssm.ops.triton.states import StatesConfig, chunk_states
from hydra_ssm.ops.triton.step_grads import step_grads
from hydra_ssm.ops.triton.value_grads import TileSums, ValueGradsConfig, value_grads

VARIANTS: dict[str, list] = {
    "states": [
        (128, StatesConfig(1, False, 4, 2)),
        (128, StatesConfig(1, False, 4, 3)),
        (128, StatesConfig(1, True, 4)),
        (64, StatesConfig(1, False, 4, 3)),
        (64, StatesConfig(1, True, 4)),
    ],
    "output": [(128, OutputConfig(24, 128, False, 8, 4)), (64, OutputConfig(8, 64, True, 4, 3))],
    "value": [(64, ValueGradsConfig(24, False, 4, 2)), (128, ValueGradsConfig(24, True, 4, 2))],
    "feature": [(Q, FeatureGradsConfig(64, 4, stages)) for Q in (64, 128) for stages in (2, 3, 4)]
    + [(128, FeatureGradsConfig(128, 8, 3))],
}  # fmt: skip


class Case:
    """One shape's inputs, with what each kernel reads made once per chunk length."""

    def __init__(self, batch: int, length: int) -> None:
        self.args = inputs(batch, length)
        x, _, _, _, *self.features, self.ids, _ = self.args
        self.x, self.dy = x, torch.randn_like(x)
        self.made: tuple = (0,)

    def pieces(self, Q: int) -> tuple:
        if self.made[0] != Q:
            _, dt_f, dt_b, A, B_f, C_f, B_b, C_b, ids, d = self.args
            self.made = (0,)
            decays = chunk_decays(Steps(dt_f, dt_b, A), ids, d, Q, True)
            S = T = None
            if self.x.shape[1] > Q:
                S = chunk_states(B_f, B_b, self.x, decays, ids, Q, StatesConfig(), "ieee", False)
                T = chunk_states(C_f, C_b, self.dy, decays, ids, Q, StatesConfig(), "ieee", True)
            self.made = (Q, decays, S, T)
        return self.made[1:]

    def call(self, kind: str, Q: int, config):
        """A function of no arguments that launches one kernel."""
        decays, S, T = self.pieces(Q)
        x, dy, ids, features = self.x, self.dy, self.ids, tuple(self.features)
        _, dt_f, dt_b, A, B_f, C_f, B_b, C_b, _, d = self.args
        if kind == "decay":
            return lambda: chunk_decays(Steps(dt_f, dt_b, A), ids, d, Q, True)
        if kind == "states":
            return lambda: chunk_states(B_f, B_b, x, decays, ids, Q, config, "ieee", False)
        if kind == "adjoint":
            return lambda: chunk_states(C_f, C_b, dy, decays, ids, Q, config, "ieee", True)
        if kind == "output":
            return lambda: chunk_outputs(x, features, decays, ids, S, Q, config, "ieee")
        if kind == "value":
            return lambda: value_grads(x, dy, features, decays, ids, T, Q, config, "ieee")
        shares = 1
        new = decays.sums.new_zeros
        shape = decays.sums.shape[:3]
        tiles = TileSums(new(*shape, 2), new(shape) if Q == 128 else None, new(*shape, 2), new(shape),
                         new(shares, 5, x.shape[0], 1, shape[2], 64))  # fmt: skip
        if kind == "feature":
            return lambda: feature_grads(x, dy, features, decays, ids, S, T, tiles, Q, config, "ieee")
        assert kind == "step"
        sums = new(4, *shape)
        products = new(2, *decays.totals.shape[:3])
        has = S is not None
        steps = Steps(dt_f, dt_b, A)
        return lambda: step_grads(steps, ids, d, tiles, sums if has else None, products if has else None, Q)


def forward_product(x, dt_f, dt_b, A, *rest, how: Plan | None = None) -> torch.Tensor:
    """The product with final steps."""
    return quasiseparable_forward(x, Steps(dt_f, dt_b, A), *rest, how=how)[0]


def backward_product(dy, x, dt_f, dt_b, A, *rest, how: Plan | None = None) -> list[torch.Tensor]:
    """Its gradients, in the order of common.NAMES."""
    grads = quasiseparable_backward(dy, x, Steps(dt_f, dt_b, A), *rest, how=how)
    return [*grads[:4], *grads[5:]]


def measured(f) -> float | str:
    """f's time in microseconds, or why there is none."""
    try:
        return graph_time(f)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"


def warm(job: int, jobs: int) -> None:
    """Compile every jobs-th variant by running it once on a small case."""
    case, short = Case(1, 512), Case(1, 128)
    todo = [(kind, Q, config) for kind, some in VARIANTS.items() for Q, config in some]
    todo += [("adjoint", Q, config) for Q, config in VARIANTS["states"]]
    for k, (kind, Q, config) in enumerate(todo):
        if k % jobs != job:
            continue
        try:
            case.call(kind, Q, config)()
            if kind in ("output", "value", "feature") and Q == 128:
                short.call(kind, Q, config)()
        except Exception as error:
            print(kind, Q, config, type(error).__name__, str(error)[:100], flush=True)
    torch.cuda.synchronize()


def planned(lines: list) -> None:
    """Forward and backward as the plan has them, on all shapes."""
    for batch, length in SHAPES:
        case, name = Case(batch, length), f"{batch}x{length}"
        forward = partial(forward_product, *case.args)
        backward = partial(backward_product, case.dy, *case.args)
        lines.append(("planned forward", name, 0, None, measured(forward)))
        lines.append(("planned backward", name, 0, None, measured(backward)))


def sweep(lines: list, best: dict) -> None:
    """Every variant on one shape, the best ones on all; appends (kind, shape, Q, config, time)."""
    reference = Case(16, 2048)
    for module, kind in ((decay, "decay"), (step_grads_module, "step")):
        for module.BLOCK_HEADS in (4, 8):
            for Q in (64, 128):
                t = measured(reference.call(kind, Q, None))
                lines.append((kind, "16x2048", Q, f"{module.BLOCK_HEADS} heads", t))
        module.BLOCK_HEADS = 8
    for kind, some in VARIANTS.items():
        for Q, config in some:
            lines.append((kind, "16x2048", Q, config, measured(reference.call(kind, Q, config))))
    for kind in VARIANTS:
        for Q in (64, 128):
            timed = [x for x in lines if x[0] == kind and x[2] == Q and isinstance(x[4], float)]
            if timed:
                best[kind, Q] = sorted(timed, key=lambda x: x[4])[0][3]
    for batch, length in SHAPES:
        case, name = Case(batch, length), f"{batch}x{length}"
        for Q in (128, 64):
            lines.append(("decay", name, Q, None, measured(case.call("decay", Q, None))))
            lines.append(("step", name, Q, None, measured(case.call("step", Q, None))))
            for kind in ("output", "value", "feature"):
                config = best[kind, Q]
                lines.append((kind, name, Q, config, measured(case.call(kind, Q, config))))
            states = StatesConfig()
            if length > Q:
                for kind in ("states", "adjoint"):
                    for q, config in VARIANTS["states"]:
                        if q == Q and not (config.heads == 1 and kind == "adjoint"):
                            lines.append((kind, name, Q, config, measured(case.call(kind, Q, config))))
                timed = [x for x in lines if x[:3] == ("states", name, Q) and isinstance(x[4], float)]
                states = sorted(timed, key=lambda x: x[4])[0][3]
            how = Plan(Q, "ieee", states, best["output", Q], best["value", Q], best["feature", Q])
            args = case.args
            lines.append(("forward", name, Q, how, measured(partial(forward_product, *args, how=how))))
            lines.append(("backward", name, Q, how, measured(partial(backward_product, case.dy, *args, how=how))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--cases", type=int, default=100, help="accuracy cases, counted from the last")
    parser.add_argument("--planned", action="store_true", help="time only what the plan chooses")
    parser.add_argument("--warm", type=int, default=None)
    given = parser.parse_args()
    if given.warm is not None:
        return warm(given.warm, given.jobs)
    begin = time.time()
    here = [sys.executable, __file__, "--jobs", str(given.jobs), "--warm"]
    for worker in [subprocess.Popen([*here, str(k)]) for k in range(0 if given.planned else given.jobs)]:
        worker.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    report: dict = {"machine": machine()}
    report["accuracy"] = accuracy(forward_product, given.cases)
    report["gradients"] = gradient_accuracy(backward_product, given.cases)
    print(f"checked after {time.time() - begin:.0f} s", flush=True)
    lines: list = []
    best: dict = {}
    try:
        planned(lines)
        if not given.planned:
            sweep(lines, best)
    finally:
        report["times"] = [(*x[:3], str(x[3]), x[4]) for x in lines]
        Path(given.out, "product.json").write_text(json.dumps(report, indent=1))
    for row in report["accuracy"] + report["gradients"]:
        worst = row.get("worst", "")
        print("ok " if row.get("ok") else "BAD", row["dtype"], row["case"], row.get("error"), row.get("eager"), worst,
              row.get("failed", ""), "" if row.get("same", True) else "NOT THE SAME TWICE")  # fmt: skip
    for kind in (*VARIANTS, "adjoint", "decay", "step", "forward", "backward", "planned forward", "planned backward"):
        for name in (f"{b}x{n}" for b, n in SHAPES):
            some = [x for x in lines if x[0] == kind and x[1] == name and isinstance(x[4], float)]
            many = 6 if name == "16x2048" else 2
            for x in sorted(some, key=lambda x: x[4])[:many]:
                config = str(x[3]).replace("Config", "") if kind not in ("forward", "backward") else ""
                print(f"{kind:8s} {name:9s} Q{x[2]:<4d} {x[4]:7.1f} us  {config}")
    print("failures", {str(x[4]) for x in lines if not isinstance(x[4], float)})
    print(report["machine"], f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
