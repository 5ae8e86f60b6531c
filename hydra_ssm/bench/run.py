"""The measurements in their order: check, ceilings, layers, then the product beside its peers."""

from __future__ import annotations

import gc
import importlib.util
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from typing import Any

import torch

from ..encoder import make_mixer
from ..mixer import Hydra, MatrixMixer
from . import layers, scans
from .clock import Run, peak_bytes, ran_out_of_memory, timed
from .costs import COSTS, Cost, product
from .layers import TOLERANCE
from .machine import Ceilings, facts
from .report import HEADER, MEANING, Row

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
Say = Callable[[str], None]


class WrongResult(RuntimeError):
    """A layer did not pass its check, so that its speed means nothing."""

    exit_code = 1


@dataclass(frozen=True)
class Settings:
    """What is measured: layers of one width on batches of about `tokens` tokens, cut into each of the lengths."""

    device: torch.device
    dtype: torch.dtype
    d_model: int
    tokens: int
    lengths: tuple[int, ...]
    layers: tuple[str, ...]

    @classmethod
    def of(
        cls, device: str | None = None, dtype: str | None = None, d_model: int | None = None,
        tokens: int | None = None, lengths: Sequence[int] | None = None, layers: Sequence[str] = tuple(COSTS),
    ) -> Settings:  # fmt: skip
        """Sizes of the paper's base model on a GPU, of half a minute on a CPU, where none are given."""
        place = _device(device)
        on_cpu = place.type == "cpu"
        usual = (128, 512, 2048) if on_cpu else (128, 512, 2048, 8192, 32768, 131072)
        found = cls(
            place,
            DTYPES[dtype or ("float32" if on_cpu else "bfloat16")],
            (256 if on_cpu else 768) if d_model is None else d_model,
            (2048 if on_cpu else 32768) if tokens is None else tokens,
            usual if lengths is None else tuple(lengths),
            tuple(dict.fromkeys(layers)),
        )
        if not (found.layers and found.lengths):
            raise ValueError("--layers and --lengths must name at least one each")
        for option, number in (("d-model", found.d_model), ("tokens", found.tokens), ("lengths", min(found.lengths))):
            if number < 1:
                raise ValueError(f"--{option} must be at least 1, got {number}")
        return found

    def shapes(self) -> list[tuple[int, int]]:
        """(batch, length): a length beyond `tokens` is one sequence."""
        return [(max(1, self.tokens // length), length) for length in self.lengths]

    def options(self) -> dict[str, Any]:
        """By name, as the command line takes them and JSON keeps them."""
        return asdict(self) | {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}

    def command(self) -> str:
        """The command that measures this again."""
        words = ["hydra-ssm", "bench"]
        for name, value in self.options().items():
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + name.replace("_", "-"), *map(str, values)]
        return shlex.join(words)


def run(settings: Settings, say: Say = print) -> dict[str, Any]:
    """Measure and tell as results come; returns all of it as JSON has it.

    Raises:
        WrongResult: before anything is timed, if a layer differs from its dense matrix in float64.
    """
    torch.manual_seed(0)
    built = {name: make_mixer(name, settings.d_model, {}).to(settings.device) for name in settings.layers}
    reference = Hydra(settings.d_model).to(settings.device)
    known = facts(settings.device)
    say(", ".join(f"{key} {value}" for key, value in known.items()))
    errors = {name: _checked(name, layers.layer_error(built[name], settings.dtype), settings) for name in built}
    errors |= {"product": _checked("product", _own_error(reference, settings), settings)}
    say("checked against float64, relative errors: " + ", ".join(f"{k} {v:.0e}" for k, v in errors.items()))
    ceilings = Ceilings.measure(settings.device, settings.dtype)
    dtype = settings.options()["dtype"]
    say(f"ceilings measured here: copy {ceilings.copy / 1e12:.3g} TB/s, {dtype} matmul {ceilings.matmul / 1e12:.3g} "
        "TFLOP/s")  # fmt: skip
    precision = dtype if settings.dtype == torch.float32 else f"{dtype} autocast"
    say(f"\nwhole layers, d_model {settings.d_model}, {precision}\n{HEADER}")
    rows = _layers(built, settings, ceilings, say)
    heads, headdim = reference.settings.nheads, reference.settings.headdim
    say(f"\nthe quasiseparable product alone, {heads} heads of {headdim}, {dtype}")
    alone = _products(reference, settings, ceilings, say)
    say(MEANING.rstrip())
    return {
        "command": settings.command(), "date": date.today().isoformat(), "machine": known,
        "settings": settings.options(), "ceilings": asdict(ceilings), "errors": errors,
        "layers": [asdict(row) for row in rows], "products": [asdict(row) for row in alone], "meaning": MEANING.strip(),
    }  # fmt: skip


def _device(name: str | None) -> torch.device:
    """The device of that name; without one a GPU, else the CPU."""
    gpus = torch.cuda.device_count()
    possible = ["cpu", "cuda", *(f"cuda:{k}" for k in range(gpus))] if gpus else ["cpu"]
    if name is not None and name not in possible:
        raise ValueError(
            f"--device must be one of {', '.join(possible)}, what torch {torch.__version__} sees, got {name}"
        )
    return torch.device(name or ("cuda" if gpus else "cpu"))


def _checked(name: str, error: float, settings: Settings) -> float:
    tolerance = TOLERANCE[settings.dtype]
    if not error <= tolerance:
        raise WrongResult(
            f"{name} is off by {error:.1e} relative to float64, more than {tolerance:.0e}; nothing is timed"
        )
    return error


def _own_error(layer: MatrixMixer, settings: Settings) -> float:
    small = scans.draw(layer, 2, 200, settings.dtype, layer.settings.ngroups, settings.device)
    return scans.product_error(scans.quasiseparable, small, ours=True)


def _layers(built: dict[str, MatrixMixer], settings: Settings, ceilings: Ceilings, say: Say) -> list[Row]:
    rows = []
    for batch, length in settings.shapes():
        for name, layer in built.items():
            cost = COSTS[name](layer, settings.dtype.itemsize, length)
            make = partial(layers.runs, layer, batch, length, settings.dtype)
            rows.append(measure(name, batch, length, make, cost, ceilings, settings.device))
            say(str(rows[-1]))
    return rows


def _products(layer: MatrixMixer, settings: Settings, ceilings: Ceilings, say: Say) -> list[Row]:
    """Ours, and the peers that are there and right."""
    groups = layer.settings.ngroups
    found: dict[str, tuple[Any, int]] = {"hydra_ssm": (scans.quasiseparable, groups)}
    for name, peer in scans.PEERS.items():
        of_peer = groups if peer.grouped else layer.settings.nheads
        scan = _peer(peer, layer, of_peer, settings)
        if isinstance(scan, str):
            say(f"{name:16} {scan}")
        else:
            found[name] = (scan, of_peer)
    rows = []
    for batch, length in settings.shapes():
        cost = product(layer, settings.dtype.itemsize)
        for name, (scan, its) in found.items():
            make = partial(_product_runs, scan, layer, batch, length, settings, its)
            rows.append(measure(name, batch, length, make, cost, ceilings, settings.device))
            say(str(rows[-1]))
    return rows


def _product_runs(
    scan: Any, layer: MatrixMixer, batch: int, length: int, settings: Settings, groups: int
) -> dict[str, Run]:
    return scans.runs(scan, scans.draw(layer, batch, length, settings.dtype, groups, settings.device))


def _peer(peer: scans.Peer, layer: MatrixMixer, groups: int, settings: Settings) -> Callable[..., Any] | str:
    """The peer's product, or why it is not measured."""
    if importlib.util.find_spec(peer.module) is None:
        return "is not installed"
    if settings.device.type == "cpu":
        return "needs a GPU"
    try:
        scan = scans.twice(peer.load())
        small = scans.draw(layer, 2, 200, settings.dtype, groups, settings.device)
        error = scans.product_error(scan, small, ours=False)
    except Exception as problem:  # another library's, of a version that nobody has tried
        return f"does not run: {type(problem).__name__}: {' '.join(str(problem).split())[:100]}"
    return scan if error <= TOLERANCE[settings.dtype] else f"is off by {error:.1e}, so it is not timed"


def measure(
    name: str, batch: int, length: int, make: Callable[[], dict[str, Run]], cost: tuple[Cost, Cost],
    ceilings: Ceilings, device: torch.device,
) -> Row:  # fmt: skip
    """The row of what `make` makes, or of its lack of memory."""
    try:
        return _measured(name, batch, length, make(), cost, ceilings, device)
    except RuntimeError as problem:
        if not ran_out_of_memory(problem):
            raise
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(name, batch, length, note="out of memory")


def _measured(
    name: str, batch: int, length: int, runs: dict[str, Run], cost: tuple[Cost, Cost], ceilings: Ceilings,
    device: torch.device,
) -> Row:  # fmt: skip
    seconds = timed(runs, device)
    peak = peak_bytes(runs["step"], device)
    tokens = batch * length
    forward, backward = (tokens * part.seconds(ceilings) for part in cost)
    return Row(
        name,
        batch,
        length,
        1e3 * seconds["forward"],
        1e3 * seconds["step"],
        None if peak is None else peak / 1e6,
        tokens / seconds["step"],
        forward / seconds["forward"],
        (forward + backward) / seconds["step"],
    )
