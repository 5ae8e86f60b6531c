"""What the CPU path costs, as ratios within one run, each measured after its correctness check.

    python benchmarks/cpu.py                        # about ten minutes on 2 cores
    python benchmarks/cpu.py --json results/cpu.json

Bars: chunked at least 20 times the recurrence at L = 4096; time per token flat within 1.5 from L = 512 to 65,536, and
memory linear; faster than attention from L = 4096 on.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from hydra_ssm import Hydra, SelfAttention
from hydra_ssm.bench.clock import interleaved
from hydra_ssm.bench.machine import device_name
from hydra_ssm.ops import Triangle, semiseparable

WIDTH, TOLERANCE = 256, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--longest", type=int, default=65536, help="longest sequence (default: %(default)s)")
    parser.add_argument("--part", help="measure this again: recurrence, length, attention or packing")
    parser.add_argument("--threads", type=int, help="of torch; 1 on a machine that is busy with other work")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)  # in a process of its own: see `memory`
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak))
        return
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parts = {"recurrence": recurrence, "length": lambda: lengths(arguments.longest)}
    parts |= {"attention": attention, "packing": packing}
    known = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.part and arguments.json else {}
    where = machine()
    results = known | {n: part() | {"machine": where} for n, part in parts.items() if arguments.part in (None, n)}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def recurrence(length: int = 4096) -> dict:
    """The chunked product against one step a token, forward and backward."""
    x, triangles = product_inputs(length)
    forms = {"chunked": "chunked", "recurrence": "recurrent"}
    run = {name: lambda impl=impl: differentiate(x, triangles, impl) for name, impl in forms.items()}
    check("chunked product and its gradients", run["chunked"](), run["recurrence"]())
    seconds = interleaved(run, repeats=3)
    ratio = seconds["recurrence"] / seconds["chunked"]
    show(f"product, L = {length}, forward and backward", seconds)
    verdict(f"chunked is {ratio:.0f} times faster", "20", ratio >= 20)
    return {"length": length, "seconds": seconds, "ratio": ratio}


def lengths(longest: int) -> dict:
    """Time per token and peak memory of a Hydra layer's training step, one sequence."""
    layer, rows = Hydra(WIDTH), {}
    u = torch.randn(1, 700, WIDTH)
    exact = Hydra(WIDTH).double()
    exact.load_state_dict(layer.state_dict())
    check("float32 layer against float64", [layer(u)], [exact(u.double()).float()])
    swept = [length for length in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536) if length <= longest]
    runs = {length: train(layer, torch.randn(1, length, WIDTH)) for length in swept}
    seconds = interleaved(runs, repeats=5)
    print(f"\nHydra layer, width {WIDTH}, forward and backward, one sequence")
    for length in swept:
        rows[length] = {"us_per_token": 1e6 * seconds[length] / length, "MB": memory(length)}
        print(f"  L = {length:6d}   {rows[length]['us_per_token']:7.1f} us a token   {rows[length]['MB']:7.0f} MB")
    times = [row["us_per_token"] for row in rows.values()]
    verdict(f"time per token varies by {max(times) / min(times):.2f}", "1.5", max(times) / min(times) <= 1.5)
    growth = rows[swept[-1]]["MB"] / rows[swept[-3]]["MB"]
    verdict(f"4 times the length takes {growth:.2f} times the memory", "4.4", growth <= 4.4)
    return rows


def attention() -> dict:
    """A Hydra layer against a Transformer's attention layer of the same width."""
    print(f"\nHydra against attention (SDPA), width {WIDTH}, one sequence, milliseconds")
    hydra, peer, rows = Hydra(WIDTH), SelfAttention(WIDTH), {}
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        u = torch.randn(1, length, WIDTH)
        if length <= 1024:
            M = peer.matrix(u)
            x = torch.randn(1, length, WIDTH // 64, 64)
            check("attention against its matrix", [M @ x], [torch.einsum("bhij,bjhp->bihp", M.dense(), x)])
        runs = {"hydra step": train(hydra, u), "attention step": train(peer, u)}
        runs |= {"hydra": infer(hydra, u), "attention": infer(peer, u)}
        found = {name: 1e3 * s for name, s in interleaved(runs, repeats=5).items()}
        rows[length] = found
        print(
            f"  L = {length:6d}   step {found['hydra step']:8.1f} against {found['attention step']:8.1f}"
            f"   forward {found['hydra']:8.1f} against {found['attention']:8.1f}"
        )
    for kind in (" step", ""):
        ahead = all(row["hydra" + kind] < row["attention" + kind] for length, row in rows.items() if length >= 4096)
        verdict(f"faster from L = 4096 on ({kind.strip() or 'forward'})", "yes", ahead)
    return rows


def packing() -> dict:
    """A batch of uneven documents, padded to the longest and packed into one row."""
    layer = Hydra(WIDTH)
    sizes = torch.randint(16, 513, (24,))
    longest = int(sizes.max())
    mask = torch.arange(longest) < sizes[:, None]
    padded = torch.randn(len(sizes), longest, WIDTH)
    packed, cu_seqlens = padded[mask][None], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    check("packed against padded", [layer(packed, cu_seqlens=cu_seqlens)[0]], [layer(padded, mask)[mask]])
    runs = {"padded": train(layer, padded, mask=mask), "packed": train(layer, packed, cu_seqlens=cu_seqlens)}
    seconds, waste = interleaved(runs, repeats=5), 1 - float(mask.float().mean())
    show(f"{len(sizes)} documents, {int(sizes.sum())} tokens, {waste:.0%} of the padded batch is padding", seconds)
    print(f"  packed takes {seconds['packed'] / seconds['padded']:.2f} of the time; {1 - waste:.2f} of it is tokens")
    return {"seconds": seconds, "padding": waste}


def product_inputs(
    length: int, heads: int = 8, headdim: int = 64, state: int = 64
) -> tuple[torch.Tensor, list[Triangle]]:
    leaf = lambda *shape: torch.randn(*shape).requires_grad_()  # noqa: E731
    A, triangles = -torch.ones(heads), []
    for upper in (False, True):
        dt = (0.1 * torch.rand(1, length, heads)).requires_grad_()
        triangles.append(Triangle(dt, A, leaf(1, length, 1, state), leaf(1, length, 1, state), upper, strict=True))
    return leaf(1, length, heads, headdim), triangles


def differentiate(x: torch.Tensor, triangles: list[Triangle], impl: str) -> list[torch.Tensor]:
    y = semiseparable(x, triangles, impl=impl)
    leaves = [x, *(part for t in triangles for part in (t.dt, t.B, t.C))]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def train(layer: torch.nn.Module, u: torch.Tensor, **where: torch.Tensor) -> Callable[[], None]:
    u = u.detach().requires_grad_()

    def step() -> None:
        u.grad = None
        layer.zero_grad()
        layer(u, **where).square().mean().backward()

    return step


def infer(layer: torch.nn.Module, u: torch.Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.inference_mode():
            layer(u)

    return forward


def memory(length: int) -> float:
    """MB that a training step at this length needs above the process at rest, in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(length)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(length: int) -> float:
    layer = Hydra(WIDTH)
    train(layer, torch.randn(1, 64, WIDTH))()
    u = torch.randn(1, length, WIDTH)
    before = high_water()
    train(layer, u)()
    return high_water() - before


def high_water() -> float:
    """Most MB that this process has held. Not ru_maxrss: a child's starts at its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def check(what: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    error = max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, expected, strict=True))
    if not error < TOLERANCE:
        raise SystemExit(f"{what}: relative error {error:.1e}, more than {TOLERANCE:.0e}; nothing is timed")
    print(f"\nchecked: {what}, relative error {error:.0e}")


def show(title: str, seconds: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in seconds.items():
        print(f"  {name:12s} {1e3 * value:9.1f} ms")


def verdict(what: str, bar: str, met: bool) -> None:
    print(f"  {what} (bar: {bar}): {'met' if met else 'NOT MET'}")


def machine() -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "date": date.today().isoformat(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "default"), "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


if __name__ == "__main__":
    main()
