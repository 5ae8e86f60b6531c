"""The measurements in their order: check, ceilings, layers, the product beside its peers, then whole encoders."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..mixer import Hydra, MatrixMixer
from . import layers, scans
from .clock import Run
from .costs import COSTS, product
from .encoders import measure_encoders
from .layers import TOLERANCE
from .machine import Ceilings, facts
from .measure import measure
from .report import HEADER, MEANING, Row, draw, write_json
from .settings import Say, Settings, WrongResult


def bench(*, plot: Path | str | None = None, json: Path | str | None = None, **options: Any) -> None:
    """What `hydra-ssm bench` does, for a machine where what parses its options is missing; they have its names.

    python -c "from hydra_ssm.bench import bench; bench(json='speed.json', encoder=True)"
    """
    settings = Settings.of(**options)
    found = run(settings)

    def keep(more: dict[str, Any]) -> None:
        found.update(more)
        if json is not None:
            write_json(Path(json), found)

    keep({})
    if settings.encoder:
        measure_encoders(settings, print, keep)
    if plot is not None:
        rows = [Row(**row) for row in found["layers"]]
        draw(Path(plot), rows, f"{found['machine']['device']}, {found['settings']['dtype']}")
    for path in (json, plot):
        if path is not None:
            print(f"wrote {path}")


def run(settings: Settings, say: Say = print) -> dict[str, Any]:
    """Measure and tell as results come; returns all of it as JSON has it.

    Raises:
        WrongResult: before anything is timed, if a layer differs from its dense matrix in float64.
    """
    torch.manual_seed(0)
    built = {name: layers.build(name, settings.d_model, settings.device) for name in settings.layers}
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
            rows.append(measure(name, batch, length, make, settings.device, (cost, ceilings)))
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
            rows.append(measure(name, batch, length, make, settings.device, (cost, ceilings)))
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
