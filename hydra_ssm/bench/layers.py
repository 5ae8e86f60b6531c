"""A layer's forward pass and training step, and whether they are right."""

from __future__ import annotations

import warnings
from copy import deepcopy

import torch
from torch import Tensor

from ..encoder import Encoder, make_mixer
from ..matrices import StructuredMatrix
from ..mixer import MatrixMixer
from .clock import Run

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


SPECS: dict[str, tuple[str, dict[str, bool]]] = {
    "hydra": ("hydra", {}), "hydra-recompute": ("hydra", {"recompute": True}), "attention": ("attention", {})
}  # fmt: skip


def build(name: str, d_model: int, device: torch.device) -> MatrixMixer:
    """The layer that the table calls so."""
    spec, options = SPECS[name]
    return make_mixer(spec, d_model, options).to(device)


def runs(layer: MatrixMixer | Encoder, batch: int, length: int, dtype: torch.dtype) -> dict[str, Run]:
    """`forward` and `step` (forward and backward, of input and parameters) on fresh inputs (batch, length, d_model)."""
    device = next(layer.parameters()).device
    u = torch.randn(batch, length, layer.d_model, device=device).to(dtype).requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad(), mixed(device, dtype):
            return layer(u)

    dy = torch.randn_like(forward())

    def step() -> None:
        with mixed(device, dtype):
            y = layer(u)
        y.backward(dy)
        u.grad = None
        layer.zero_grad()

    return {"forward": forward, "step": step}


def mixed(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to a 16-bit dtype, parameters staying in float32.

    Each use of a parameter casts it: a copy that is kept would be one of another CUDA graph's memory.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def layer_error(layer: MatrixMixer, dtype: torch.dtype, batch: int = 2, length: int = 200) -> float:
    """The larger relative error of output and input gradient, against the layer's dense matrix in float64."""
    device = layer.in_proj.weight.device
    u, dy = (torch.randn(batch, length, layer.d_model).to(dtype) for _ in range(2))
    there = u.to(device).requires_grad_()
    with mixed(device, dtype):
        y = layer(there)
    with warnings.catch_warnings():
        # Of the first operation in autograd's thread, where that is cuBLAS: it then makes the context itself.
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")
        (du,) = torch.autograd.grad(y, there, dy.to(device, y.dtype))
    exact = deepcopy(layer).cpu().double()
    exact.matrix_class = by_entries(exact.matrix_class)
    wide = u.double().requires_grad_()
    expected = exact(wide)
    (gradient,) = torch.autograd.grad(expected, wide, dy.double())
    return max(relative_error(y, expected), relative_error(du, gradient))


def by_entries(matrix: type[StructuredMatrix]) -> type[StructuredMatrix]:
    """The same class with the product of its definition in place of its fast one and of fused kernels."""

    def multiply(self: StructuredMatrix, x: Tensor) -> Tensor:
        return torch.einsum("bhij,bjhp->bihp", self.dense(), x)

    return type(matrix.__name__, (matrix,), {"multiply": multiply, "fused": lambda *_: None})


def relative_error(found: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm; NaN where anything found is."""
    exact = exact.detach()
    return float((found.detach().cpu().double() - exact).norm() / exact.norm())
