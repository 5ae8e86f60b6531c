"""The modules that a mixer's parameters live in.

Each reads its own inside its own call alone: that is when hooks that fetch parameters, as those of weights that were
left on the disk do, have them there.
"""

from __future__ import annotations

from torch import Tensor, nn

from .ops import Documents, gated_rms_norm, short_conv


class ShortConv(nn.Conv1d):
    """The parameters and initialisation of nn.Conv1d, for (B, L, C) and documents."""

    def forward(  # type: ignore[override]
        self, x: Tensor, documents: Documents | None, activation: bool, impl: str | None
    ) -> Tensor:
        return short_conv(x, self.weight, self.bias, documents, activation=activation, impl=impl)


class GatedNorm(nn.Module):
    """A weight under its released name, for a norm whose arithmetic is in ops."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, y: Tensor, z: Tensor, impl: str | None) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.eps, impl=impl)


class Parameters(nn.Module):
    """Holds parameters of a matrix class whose names have a dot."""

    def forward(self, name: str) -> Tensor:
        return getattr(self, name)


def read(module: nn.Module, name: str) -> Tensor:
    """By attribute: under parametrizations, sharding or functional_call what stands there is no nn.Parameter."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path)(leaf) if path else getattr(module, leaf)
