"""The quasiseparable product alone, beside other libraries' causal scans called twice.

The others' scans lack the shift and the diagonal, so they compute a little less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

from ..matrices import Quasiseparable
from ..mixer import MatrixMixer
from ..ops import Triangle, semiseparable
from .clock import Run
from .layers import relative_error

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, dt, A, B, C) to y, left to right


@dataclass(frozen=True)
class Inputs:
    """What the product reads: x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N), diagonal (B, L, H)."""

    x: Tensor
    dt_f: Tensor
    dt_b: Tensor
    A: Tensor
    B_f: Tensor
    C_f: Tensor
    B_b: Tensor
    C_b: Tensor
    diagonal: Tensor

    def leaves(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
        """All on a device, and in a dtype if one is given, as leaves that want gradients."""
        return Inputs(*(t.detach().to(device, dtype).requires_grad_() for t in self.leaves()))

    def triangles(self, strict: bool) -> tuple[Triangle, Triangle]:
        return (
            Triangle(self.dt_f, self.A, self.B_f, self.C_f, strict=strict),
            Triangle(self.dt_b, self.A, self.B_b, self.C_b, upper=True, strict=strict),
        )


def draw(layer: MatrixMixer, batch: int, length: int, dtype: torch.dtype, groups: int, device: torch.device) -> Inputs:
    """Random inputs as a layer of these sizes has them: what feeds exponents in float32."""
    s = layer.settings
    x = torch.randn(batch, length, s.nheads, s.headdim, device=device).to(dtype)
    features = [torch.randn(batch, length, groups, s.d_state, device=device) for _ in range(4)]
    B_f, C_f, B_b, C_b = ((t / s.d_state**0.5).to(dtype) for t in features)
    dt_f, dt_b = (0.1 * torch.rand(batch, length, s.nheads, device=device) for _ in range(2))
    diagonal = torch.randn(batch, length, s.nheads, device=device).to(dtype)
    return Inputs(x, dt_f, dt_b, -torch.ones(s.nheads, device=device), B_f, C_f, B_b, C_b, diagonal).to(device)


def quasiseparable(inputs: Inputs) -> Tensor:
    """Ours: both directions, the shift and the diagonal."""
    return Quasiseparable(None, inputs.triangles(strict=True), inputs.diagonal) @ inputs.x


def twice(scan: Scan) -> Callable[[Inputs], Tensor]:
    """A causal scan and, on flipped inputs, an anticausal one, summed."""

    def product(i: Inputs) -> Tensor:
        back = scan(i.x.flip(1), i.dt_b.flip(1), i.A, i.B_b.flip(1), i.C_b.flip(1))
        return scan(i.x, i.dt_f, i.A, i.B_f, i.C_f) + back.flip(1)

    return product


def product_error(product: Callable[[Inputs], Tensor], inputs: Inputs, ours: bool) -> float:
    """The larger relative error of y and dx against the recurrence in float64."""
    y = product(inputs)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, inputs.x, dy)
    exact = inputs.to(torch.device("cpu"), torch.float64)
    expected = semiseparable(exact.x, exact.triangles(strict=ours), impl="recurrent")
    if ours:
        expected = expected + exact.x * exact.diagonal[..., None]
    (gradient,) = torch.autograd.grad(expected, exact.x, dy.cpu().double())
    return max(relative_error(y, expected), relative_error(dx, gradient))


def runs(product: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Run]:
    """`forward` and `step` of a product."""

    def forward() -> Tensor:
        with torch.no_grad():
            return product(inputs)

    dy = torch.randn_like(forward())

    def step() -> None:
        product(inputs).backward(dy)
        for leaf in inputs.leaves():
            leaf.grad = None

    return {"forward": forward, "step": step}


def mamba_ssm() -> Scan:
    """mamba_ssm's chunked scan with the chunk that the released Hydra takes."""
    return partial(import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined, chunk_size=256)


def fla() -> Scan:
    """flash-linear-attention's gated linear attention with one decay a head, which is the same scan."""
    attend = import_module("fla.ops.simple_gla").chunk_simple_gla

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return attend(q=C, k=B, v=(x * dt[..., None]).to(x.dtype), g=dt * A, scale=1.0)[0]

    return scan


@dataclass(frozen=True)
class Peer:
    """Another library's scan; one that knows no groups gets B and C for each head, made beforehand."""

    module: str
    load: Callable[[], Scan]
    grouped: bool


PEERS = {"mamba_ssm twice": Peer("mamba_ssm", mamba_ssm, True), "fla twice": Peer("fla", fla, False)}
