"""What the product of every matrix class costs as sequences grow, beside what the class promises."""

from __future__ import annotations

import ctypes
import gc
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..matrices import MATRICES, Inputs, StructuredMatrix
from ..matrices import Settings as MatrixSettings
from .clock import Run, peak_bytes, ran_out_of_memory, timed
from .growth import HEADER, LAWS, MEANING, PROMISES, Growth, Point, draw, line
from .layers import TOLERANCE, relative_error
from .machine import facts
from .report import write_json
from .settings import DTYPES, Say, WrongResult, device_of

SHORTEST = 256
REPEATS, PATIENCE = 7, 2.0  # of a run, as long as it has not taken so many seconds
ROUNDS = 3  # of these where a time is above its promise, since others' work only ever adds to it
Key = tuple[int, str]  # length, and forward or step
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
MEMORY = 4e9  # bytes of a step on a CPU; a GPU says itself what does not fit


@dataclass(frozen=True)
class Sizes:
    """What is measured: products of one sequence with `heads` matrices, up to where a step takes `seconds`."""

    device: torch.device
    dtype: torch.dtype
    longest: int
    heads: int
    headdim: int
    order: int
    seconds: float

    @classmethod
    def of(cls, device: str | None = None, dtype: str | None = None, longest: int | None = None) -> Sizes:
        """Of a few minutes, on a GPU and on a CPU."""
        place = device_of(device)
        on_cpu = place.type == "cpu"
        longest = (65536 if on_cpu else 131072) if longest is None else longest
        if longest < 2 * SHORTEST:
            raise ValueError(f"--longest must be at least {2 * SHORTEST}, got {longest}")
        kind = DTYPES[dtype or ("float32" if on_cpu else "bfloat16")]
        return cls(place, kind, longest, *((2, 8, 4, 1.2) if on_cpu else (8, 64, 16, 0.4)))

    def lengths(self) -> list[int]:
        """Octaves."""
        return [SHORTEST << n for n in range((self.longest // SHORTEST).bit_length())]

    def options(self) -> dict[str, Any]:
        """As JSON has them."""
        return asdict(self) | {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}

    def command(self) -> str:
        """The command that measures this again."""
        found = self.options()
        words = (f"--{name} {found[name]}" for name in ("device", "dtype", "longest"))
        return shlex.join(["hydra-ssm", "bench", "--matrices", *" ".join(words).split()])


def bench_matrices(
    *, plot: Path | str | None = None, json: Path | str | None = None, say: Say = print, **options: Any
) -> dict[str, Any]:
    """What `hydra-ssm bench --matrices` does; options as in `Sizes.of`. Returns all of it as JSON has it."""
    sizes = Sizes.of(**options)
    known = facts(sizes.device)
    say(", ".join(f"{key} {value}" for key, value in known.items()))
    torch.manual_seed(0)
    errors = {name: _checked(name, sizes) for name in PROMISES}
    worst = max(errors, key=lambda name: errors[name])
    say(f"checked against float64: the largest relative error is {errors[worst]:.0e}, of {worst}")
    say(f"\nM @ x, 1 sequence, {sizes.heads} heads of {sizes.headdim}, order {sizes.order}, {sizes.options()['dtype']}")
    say(HEADER)
    found: list[Point] = []
    growths = []
    for name in PROMISES:
        points = measure(name, sizes)
        if points:
            growths.append(Growth.of(points))
            say(line(points[-1], growths[-1]))
        found += points
    say(MEANING.rstrip())
    report = {
        "command": sizes.command(), "date": date.today().isoformat(), "machine": known, "settings": sizes.options(),
        "errors": errors, "points": [asdict(p) for p in found],
        "growth": [asdict(g) | {"kept": g.kept} for g in growths], "meaning": MEANING.strip(),
    }  # fmt: skip
    if json is not None:
        write_json(Path(json), report)
    if plot is not None:
        draw(Path(plot), found, f"{known['device']}, {sizes.options()['dtype']}")
    for path in (json, plot):
        if path is not None:
            say(f"wrote {path}")
    return report


def measure(name: str, sizes: Sizes) -> list[Point]:
    """The class at each length, as long as the next one is expected to fit into memory and time."""
    on_cpu, peaks = sizes.device.type == "cpu", dict[int, int | None]()
    law, memory_law = LAWS[PROMISES[name][0]], LAWS[PROMISES[name][1]]
    step: Run | None = None
    for length in sizes.lengths():
        try:
            step = make(name, length, sizes)["step"]
            step()
            seconds = min(_once(step, sizes.device) for _ in range(2))
            peaks[length] = peak_bytes(step, sizes.device)
        except RuntimeError as problem:
            if not ran_out_of_memory(problem):
                raise
            break
        if seconds * law(2 * length) / law(length) > sizes.seconds:
            break
        if on_cpu and (peaks[length] or 0) * memory_law(2 * length) / memory_law(length) > MEMORY:
            break
    step = None
    gc.collect()
    if not on_cpu:
        torch.cuda.empty_cache()
    found = _times(name, list(peaks), sizes)
    points = []
    for n, peak in ((n, peak) for n, peak in peaks.items() if (n, "step") in found):
        forward, both = (1e3 * found[n, part] for part in ("forward", "step"))
        points.append(Point(name, n, forward, both, None if peak is None else peak / 1e6))
    return points


def _times(name: str, lengths: Sequence[int], sizes: Sizes) -> dict[Key, float]:
    """The least seconds of several; on a CPU in turns over the lengths, so that a slow moment falls on all."""

    def runs(length: int) -> dict[Key, Run]:
        return {(length, part): run for part, run in make(name, length, sizes).items()}

    found: dict[Key, float] = {}
    if sizes.device.type != "cpu":
        for length in lengths:
            try:
                found |= timed(runs(length), sizes.device, min)
            except torch.OutOfMemoryError:  # beside what empties the cache between runs
                break
        return found
    together = {key: run for length in lengths for key, run in runs(length).items()}
    with memory_is_kept():
        for _ in range(ROUNDS):
            _in_turns(together, found, sizes.device)
            points = [Point(name, n, found[n, "forward"], found[n, "step"], None) for n in lengths]
            if Growth.of(points).kept:
                break
    return found


def _in_turns(runs: Mapping[Key, Run], found: dict[Key, float], device: torch.device) -> None:
    """Lowers the seconds found of each run to the least of several more."""
    spent = dict.fromkeys(runs, 0.0)
    for attempt in range(REPEATS + 1):
        for key in (key for key in runs if spent[key] < PATIENCE):
            seconds = _once(runs[key], device)
            if attempt:  # the first warms up
                found[key] = min(found.get(key, math.inf), seconds)
                spent[key] += seconds


@contextmanager
def memory_is_kept() -> Iterator[None]:
    """What is freed stays with the process, or the first touches of new pages would be timed. For glibc alone."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_TRIM_THRESHOLD, 128 << 10)


def _once(run: Run, device: torch.device) -> float:
    """Seconds of a run; on a CPU those of all its threads on a processor, which other programs do not lengthen."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def make(name: str, length: int, sizes: Sizes) -> dict[str, Run]:
    """`forward` and `step`, on fresh inputs (1, length, heads, headdim)."""
    inputs, x, dy = draw_inputs(name, length, sizes)
    matrix = MATRICES[name]
    leaves = [t for t in (x, *inputs.features.values(), *inputs.parameters.values()) if t.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return matrix.build(inputs) @ x

    def step() -> None:
        torch.autograd.grad(matrix.build(inputs) @ x, leaves, dy, allow_unused=True)

    return {"forward": forward, "step": step}


def draw_inputs(name: str, length: int, sizes: Sizes) -> tuple[Inputs, Tensor, Tensor]:
    """What a matrix of the class is made of, x, and the gradient of the product."""
    matrix, device = MATRICES[name], sizes.device
    settings = MatrixSettings(sizes.heads, sizes.headdim, sizes.order, max_length=length)
    drawn = partial(torch.randn, dtype=sizes.dtype, device=device)
    features = {f.name: drawn(1, length, *f.shape).requires_grad_() for f in matrix.features(settings)}
    with device:  # a matrix of parameters is drawn where it is used
        parameters = {n: p.requires_grad_() for n, p in matrix.parameters(settings).items()}
    x, dy = (drawn(1, length, sizes.heads, sizes.headdim) for _ in range(2))
    return Inputs(x.requires_grad_(), features, parameters, settings, None), x, dy


def _checked(name: str, sizes: Sizes, length: int = 200) -> float:
    """The larger relative error of product and gradient of x."""
    inputs, x, dy = draw_inputs(name, length, sizes)
    y = MATRICES[name].build(inputs) @ x
    found = y, *torch.autograd.grad(y, x, dy.to(y.dtype))
    wide = _in_float64(inputs)
    exact = _by_definition(MATRICES[name].build(wide), wide.x)
    expected = exact, *torch.autograd.grad(exact, wide.x, dy.cpu().double())
    error = max(relative_error(f, e) for f, e in zip(found, expected, strict=True))
    if not error <= TOLERANCE[sizes.dtype]:
        bar = TOLERANCE[sizes.dtype]
        raise WrongResult(f"{name} is off by {error:.1e} relative to float64, more than {bar:.0e}; nothing is timed")
    return error


def _in_float64(inputs: Inputs) -> Inputs:
    def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.detach().cpu().double() for n, t in tensors.items()}

    x = inputs.x.detach().cpu().double().requires_grad_()
    settings = replace(inputs.settings, impl="recurrent")
    return replace(inputs, x=x, features=wide(inputs.features), parameters=wide(inputs.parameters), settings=settings)


def _by_definition(matrix: StructuredMatrix, x: Tensor) -> Tensor:
    """By the entries; a class without a matrix, by the recurrence."""
    try:
        return torch.einsum("bhij,bjhp->bihp", matrix.dense(), x)
    except TypeError:
        return matrix @ x
