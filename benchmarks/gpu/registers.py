"""Compile the product's kernels for a GPU that need not be there, and read what the assembler made of them.

    python benchmarks/gpu/registers.py [--arch 90] [--quick]

For each kernel: registers and bytes that did not fit into them, and uniform registers that are read before anything is
written to them. ptxas 12.8 does that where a product's operand has rows of 16 or 32 numbers and no loop is left around
it: addresses are then random. Exits with 1 if it finds one. --quick: one of the shapes that it did so for, in two
kernels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hydra_ssm.ops.triton.decay import Steps
from hydra_ssm.ops.triton.plan import plan
from hydra_ssm.ops.triton.product import quasiseparable_backward, quasiseparable_forward

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+(.*?);")
WRITES = ("R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX")  # uniform registers, besides what begins with U


@dataclass(frozen=True)
class Case:
    """Shapes of a product: state, width of a head, heads, groups, length."""

    N: int
    P: int
    H: int
    G: int
    L: int


QUICK = [Case(64, 16, 8, 8, 200)]
CASES = [
    *(Case(N, P, 8, 8, L) for N, P in ((16, 64), (32, 64), (64, 16), (64, 32)) for L in (100, 200)),
    *(Case(N, P, 8, 1, 200) for N in (16, 32, 64) for P in (16, 32, 64)),
    *(Case(N, P, 8, 2, 5000) for N, P in ((16, 64), (64, 16), (32, 32), (64, 64), (128, 64), (64, 128))),
    *(Case(N, 64, 24, 1, L) for N in (16, 64) for L in (100, 5000)),
]


class NoDevice:
    """What triton asks of a driver to compile for a device that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only() -> list[tuple[str, Any]]:
    """From now on kernels are compiled and not run; the list fills with their names and what was compiled."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = record
    return compiled


def product(case: Case, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every kernel of it, forward and backward."""
    x = torch.zeros(1, case.L, case.H, case.P, dtype=dtype)
    features = [torch.zeros(1, case.L, case.G, case.N, dtype=dtype) for _ in range(4)]
    dt, diagonal = torch.zeros(2, 1, case.L, case.H, dtype=dtype), torch.zeros(1, case.L, case.H, dtype=dtype)
    steps = Steps(dt[0], dt[1], torch.ones(case.H), torch.zeros(2, case.H), (0.0, float("inf")))
    how = plan(x, features[0], backward=True)
    quasiseparable_forward(x, steps, *features, None, diagonal)
    quasiseparable_backward(torch.zeros_like(x), x, steps, *features, None, diagonal, None, how)


def read_before_written(sass: str) -> Iterator[str]:
    """Instructions in the order of the program that read a uniform register before any wrote to it."""
    written: set[int] = set()
    for offset, op, operands in INSTRUCTION.findall(sass):
        given = [o.strip() for o in operands.split(",")]
        target = None
        if op.startswith(("U", *WRITES)) and (found := re.fullmatch(r"UR(\d+)", given[0])):
            target, given = int(found[1]), given[1:]
        if "GMMA" in op:  # the second operand's address is in the upper half of four registers
            read = {int(n) + half for n in re.findall(r"gdesc\[UR(\d+)\]", operands) for half in (2, 3)}
        else:
            read = {int(n) for o in given for n in re.findall(r"UR(\d+)", o)}
        if read - written:
            yield f"{offset}: {op} {operands.strip()}"
        if target is not None:
            pair = ".WIDE" in op or (".64" in op and ".HI" not in op) or op.startswith("CS2UR")
            written |= set(range(target, target + (2 if pair else 1)))


def assembled(kernel: Any) -> tuple[str, str]:
    """(its instructions, its use of registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-sass", "-res-usage")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return sass, "" if found is None else f"{found[1]} registers, {found[2]} bytes beside them"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for 9.0")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    driver.set_active(NoDevice(options.arch))
    compiled, bad = compile_only(), 0
    for case in QUICK if options.quick else CASES:
        product(case)
        print(case, flush=True)
        for name, kernel in compiled:
            sass, usage = assembled(kernel)
            faults = list(read_before_written(sass))
            bad += len(faults)
            print(f"  {name:25}{usage}", *faults[:3], sep="\n    reads what nothing wrote, ", flush=True)
        compiled.clear()
    print(f"{bad} instructions read registers that nothing wrote")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
