"""Check and time the forward kernels over shapes and configurations: one call, JSON to --out, a table at the end.

Compilation is spread over processes (--jobs) that share Triton's cache; then everything is measured in one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent))
from common import SHAPES, accuracy, graph_time, inputs, machine

from hydra_ssm.ops.triton.decay import chunk_decays
from hydra_ssm.ops.triton.output import OutputConfig, chunk_outputs
from hydra_ssm.ops.triton.plan import Plan
from hydra_ssm.ops.triton.product import quasiseparable_forward
from hydra_ssm.ops.triton.states import StatesConfig, chunk_states

OUTPUTS = [
    (Q, OutputConfig(heads, rows, packed, warps, stages))
    for Q, rows, warps in ((128, 128, 8), (128, 64, 4), (64, 64, 4), (256, 64, 4))
    for packed in (False, True)
    for heads, stages in ((2, 2), (4, 2), (8, 2), (8, 3), (12, 2), (24, 2))
    if not (Q == 256 and (not packed or stages == 3))
]
STATES = [
    (Q, StatesConfig(block, 1, warps, stages))
    for Q in (64, 128, 256)
    for block, warps in ((64, 4), (32, 4), (64, 8))
    for stages in (2, 3)
    if not (Q == 256 and block == 64 and stages == 3)
]


class Case:
    """One shape's inputs, with the pieces each kernel needs made once per chunk length."""

    def __init__(self, batch: int, length: int) -> None:
        self.args = inputs(batch, length)
        self.made: dict[int, tuple] = {}

    def pieces(self, Q: int):
        if Q not in self.made:
            x, dt_f, dt_b, A, B_f, _, B_b, _, ids, d = self.args
            decays, totals, diagonals = chunk_decays(dt_f, dt_b, A, d, Q)
            config = StatesConfig(stretches=stretches(x, Q))
            states = chunk_states(B_f, B_b, x, decays, totals, ids, Q, config, "ieee", False)
            self.made = {Q: (decays, totals, diagonals, states if x.shape[1] > Q else None)}
        return self.made[Q]

    def output(self, Q: int, config: OutputConfig):
        decays, _, diagonals, states = self.pieces(Q)
        x, _, _, _, B_f, C_f, B_b, C_b, ids, _ = self.args
        return lambda: chunk_outputs(x, (B_f, C_f, B_b, C_b), decays, diagonals, ids, states, Q, config, "ieee")

    def state(self, Q: int, config: StatesConfig):
        decays, totals, _, _ = self.pieces(Q)
        x, _, _, _, B_f, _, B_b, _, ids, _ = self.args
        return lambda: chunk_states(B_f, B_b, x, decays, totals, ids, Q, config, "ieee", False)

    def decay(self, Q: int):
        _, dt_f, dt_b, A, *_, d = self.args
        return lambda: chunk_decays(dt_f, dt_b, A, d, Q)


def stretches(x, Q: int) -> int:
    return max(1, min(512 // (2 * x.shape[0] * x.shape[2]), x.shape[1] // (8 * Q)))


def compiled(f):
    """f's time, or why there is none."""
    try:
        return graph_time(f)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=".")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--warm", type=int, default=None)
    given = parser.parse_args()
    if given.warm is not None:
        case = Case(1, 512)
        for k, (Q, config) in enumerate(OUTPUTS + STATES):
            if k % given.jobs == given.warm:
                f = case.output(Q, config) if isinstance(config, OutputConfig) else case.state(Q, config)
                try:
                    f()
                except Exception as error:
                    print(Q, config, type(error).__name__, str(error)[:100], flush=True)
        torch.cuda.synchronize()
        return
    begin = time.time()
    here = [sys.executable, __file__, "--jobs", str(given.jobs), "--warm"]
    for worker in [subprocess.Popen([*here, str(k)]) for k in range(given.jobs)]:
        worker.wait()
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    report: dict = {"machine": machine(), "accuracy": accuracy(quasiseparable_forward)}
    for row in report["accuracy"]:
        print(row, flush=True)
    lines = []
    case = Case(16, 2048)
    for Q, config in OUTPUTS:
        lines.append(("output", "16x2048", Q, str(config), compiled(case.output(Q, config))))
    best = min((line for line in lines if isinstance(line[-1], float)), key=lambda line: line[-1])
    best_output = {
        Q: min(((lines[k][-1], c) for k, (q, c) in enumerate(OUTPUTS) if q == Q and isinstance(lines[k][-1], float)),
               key=lambda t: t[0], default=(0, None))[1]
        for Q in (64, 128, 256)
    }  # fmt: skip
    print("best output", best, best_output, flush=True)
    for batch, length in SHAPES:
        case = Case(batch, length)
        name = f"{batch}x{length}"
        for Q in (64, 128, 256):
            lines.append(("decay", name, Q, "", compiled(case.decay(Q))))
            if best_output[Q] is not None:
                lines.append(("output", name, Q, str(best_output[Q]), compiled(case.output(Q, best_output[Q]))))
            if length <= Q:
                continue
            fastest = (1e9, None)
            n = stretches(case.args[0], Q)
            for q, config in STATES:
                for s in sorted({1, n, 2 * n, 4 * n}):
                    if q != Q or length // Q < 2 * s:
                        continue
                    if s > 1 and config.warps == 8:
                        continue
                    full = StatesConfig(config.block_p, s, config.warps, config.stages)
                    t = compiled(case.state(Q, full))
                    lines.append(("states", name, Q, str(full), t))
                    if isinstance(t, float) and t < fastest[0]:
                        fastest = (t, full)
            if fastest[1] is not None and best_output[Q] is not None:
                how = Plan(Q, "ieee", fastest[1], best_output[Q])
                lines.append(("whole", name, Q, str(how), compiled(lambda: quasiseparable_forward(*case.args, how=how))))
        if length == 128:
            how = Plan(128, "ieee", StatesConfig(), best_output[128])
            lines.append(("whole", name, 128, str(how), compiled(lambda: quasiseparable_forward(*case.args, how=how))))
    report["times"] = lines
    Path(given.out, "forward.json").write_text(json.dumps(report, indent=1))
    for kind in ("output", "states", "decay", "whole"):
        for name in dict.fromkeys(line[1] for line in lines):
            some = [x for x in lines if x[0] == kind and x[1] == name and isinstance(x[-1], float)]
            for line in sorted(some, key=lambda x: x[-1])[: 4 if kind != "output" or name != "16x2048" else 14]:
                print(f"{line[0]:7s} {line[1]:9s} Q{line[2]:<4d} {line[-1]:7.1f} us  {line[3]}")
    bad = {str(x[-1]) for x in lines if not isinstance(x[-1], float)}
    print("failures", bad)
    print(report["machine"], triton.__version__)


if __name__ == "__main__":
    main()
