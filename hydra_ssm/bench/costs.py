"""What a token must cost at least: the floor that measured times are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..mixer import MatrixMixer
from .machine import Ceilings

CHUNK = 64  # tokens of a chunk in the counted form of the quasiseparable product


@dataclass(frozen=True)
class Cost:
    """Of one token: FLOP of the projections, FLOP of the products between them, bytes moved between them."""

    projections: float
    products: float
    traffic: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.projections + other.projections, self.products + other.products, self.traffic + other.traffic)

    def seconds(self, ceilings: Ceilings) -> float:
        """The projections at the matmul's rate, then the rest at the rate that holds it back longer."""
        between = max(self.products / ceilings.matmul, self.traffic / ceilings.copy)
        return self.projections / ceilings.matmul + between


def product(layer: MatrixMixer, size: int) -> tuple[Cost, Cost]:
    """The quasiseparable product in chunks, forward and backward; `size` bytes a number, each moved once.

    Forward reads x, B, C, dt and the diagonal and writes y; backward reads these and dy and writes a gradient of
    each. Scores are counted once a group, states once a direction and head.
    """
    s, inner = layer.settings, layer.d_inner
    H, P, N, scores = s.nheads, s.headdim, s.d_state, 2 * CHUNK * s.d_state * s.ngroups
    channels = inner + 4 * s.ngroups * N
    forward = Cost(0, H * (8 * N * P + 2 * CHUNK * P) + scores, size * (channels + inner + 3 * H))
    backward = Cost(0, H * (20 * N * P + 4 * CHUNK * P) + 2 * scores, size * (2 * channels + inner + 6 * H))
    return forward, backward


def hydra(layer: MatrixMixer, size: int, length: int) -> tuple[Cost, Cost]:
    """The Hydra layer: in_proj, fc_D, out_proj, and three passes between: convolution, product, gated norm.

    The convolution reads and writes its channels and the steps; the gated norm reads z, and y is still at hand.
    Backward, the norm reads dout, y and z and writes dy and dz, and the convolution reads its input and a gradient
    and writes one.
    """
    inner, H, d = layer.d_inner, layer.settings.nheads, layer.d_model
    channels = inner + 4 * layer.settings.ngroups * layer.settings.d_state
    projections = 2 * d * (inner + channels + 2 * H) + 2 * inner * H + 2 * inner * d
    forward, backward = product(layer, size)
    forward += Cost(projections, 0, size * (2 * channels + 2 * inner + 5 * H))
    backward += Cost(2 * projections, 0, size * (3 * channels + 5 * inner + 2 * H))
    return forward, backward


def attention(layer: MatrixMixer, size: int, length: int) -> tuple[Cost, Cost]:
    """The Transformer's layer with fused attention: two products of L x L scores forward, five backward."""
    d, inner = layer.d_model, layer.d_inner
    forward = Cost(8 * d * inner, 4 * length * inner, size * 4 * inner)
    return forward, Cost(2 * forward.projections, 2.5 * forward.products, 2 * forward.traffic)


# What is computed twice is no more than must be.
COSTS: dict[str, Callable[[MatrixMixer, int, int], tuple[Cost, Cost]]] = {
    "hydra": hydra, "hydra-recompute": hydra, "attention": attention
}  # fmt: skip
