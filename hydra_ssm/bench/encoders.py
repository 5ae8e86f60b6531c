"""Whole encoders, compiled where there is a GPU, and the forward pass of layers too small to fill one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..encoder import Encoder
from ..mixer import MatrixMixer
from .layers import TOLERANCE, build, mixed, relative_error, runs
from .measure import measure
from .report import ENCODER_HEADER, Row
from .settings import Say, Settings, WrongResult

STACKS: dict[str, tuple[str, int, int]] = {  # as the presets: layers, d_ff / d_model
    "hydra": ("hydra-base", 23, 0),
    "attention": ("bert-base", 12, 4),
}
LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
SMALL = (256, 8, 128)  # width, batch, length


def measure_encoders(settings: Settings, say: Say, keep: Callable[[dict[str, Any]], None]) -> None:
    """Steps of stacks on half the tokens that the layers get, then what small layers cost.

    keep: takes, as JSON has it, what is known after each row.
    """
    tokens = max(1, settings.tokens // 2)
    say(f"\nwhole encoders without embeddings and heads, d_model {settings.d_model}\n{ENCODER_HEADER}")
    rows = []
    for length in (n for n in LENGTHS if n <= tokens):
        for name in (name for name in settings.layers if name in STACKS):
            rows.append(_row(name, tokens // length, length, settings, say))
            say(str(rows[-1]))
            keep({"encoders": [asdict(row) for row in rows]})
    say(f"\nlayers of width {SMALL[0]}, forward alone\n{ENCODER_HEADER}")
    keep({"small": [asdict(row) for row in _small(settings, say)]})


def _row(name: str, batch: int, length: int, settings: Settings, say: Say) -> Row:
    """The time of a step, compiled if that works and gives the same."""
    title, depth, ratio = STACKS[name]
    d_model, device, dtype = settings.d_model, settings.device, settings.dtype
    torch.manual_seed(0)
    encoder = Encoder(d_model, [name] * depth, d_ff=ratio * d_model).to(device)

    def make() -> dict[str, Any]:
        return {"step": runs(encoder, batch, length, dtype)["step"]}

    compiled = device.type == "cuda" and compile_layers(encoder, title, batch, length, dtype, say)
    return replace(measure(title, batch, length, make, device), compiled=compiled)


def compile_layers(encoder: Encoder, title: str, batch: int, length: int, dtype: torch.dtype, say: Say) -> bool:
    """Compile each layer, which is one compilation for all layers that are alike; False if that does not work.

    Raises:
        WrongResult: if the compiled stack is less exact than the eager one.
    """
    device = next(encoder.parameters()).device
    u, dy = (torch.randn(batch, length, encoder.d_model, device=device) for _ in range(2))
    # Two sequences are enough: they know nothing of the others.
    exact, eager = (
        gradient(e, u[:2], dy[:2], kind) for e, kind in ((_reference(encoder), torch.float32), (encoder, dtype))
    )
    torch.compiler.reset()  # another shape is another program, not one for all
    for layer in encoder.layers:
        layer.compile(dynamic=False)
    try:
        found = gradient(encoder, u, dy, dtype)
    except torch.OutOfMemoryError:  # the measurement will say so
        return True
    except Exception as problem:
        say(f"{title} does not compile: {type(problem).__name__}: {' '.join(str(problem).split())[:100]}")
        for layer in encoder.layers:
            layer._compiled_call_impl = None  # type: ignore[assignment]
        return False
    for what, ours, usual, truth in zip(("output", "gradient"), found, eager, exact, strict=True):
        error = relative_error(ours[:2], truth.cpu().double())
        bar = max(2 * relative_error(usual, truth.cpu().double()), TOLERANCE[dtype])
        if not error <= bar:
            raise WrongResult(f"the {what} of {title}, compiled, is off by {error:.1e}, more than {bar:.1e}")
    return True


def _reference(encoder: Encoder) -> Encoder:
    """The same encoder, without kernels and with little memory."""
    exact = deepcopy(encoder)
    exact.gradient_checkpointing = True
    for layer in exact.modules():
        if isinstance(layer, MatrixMixer):
            layer.settings = replace(layer.settings, impl="chunked")
    return exact


def gradient(encoder: Encoder, u: Tensor, dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    u = u.detach().requires_grad_()
    with mixed(u.device, dtype):
        y = encoder(u)
    y.backward(dy.to(y.dtype))
    assert u.grad is not None
    encoder.zero_grad()
    return y.detach(), u.grad


def _small(settings: Settings, say: Say) -> list[Row]:
    """Forward passes of one layer, and how many times attention's they are."""
    d_model, batch, length = SMALL
    rows = []
    for name in dict.fromkeys(("hydra", "attention")):
        torch.manual_seed(0)
        make = partial(_forward, build(name, d_model, settings.device), batch, length, settings.dtype)
        rows.append(measure(name, batch, length, make, settings.device))
        say(str(rows[-1]))
    ours, theirs = (row.forward if row.graph_forward is None else row.graph_forward for row in rows)
    if ours and theirs:
        say(f"hydra / attention: {ours / theirs:.2f}")
    return rows


def _forward(layer: Any, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"forward": runs(layer, batch, length, dtype)["forward"]}
