"""The quasiseparable product on a GPU: both strict triangles and the diagonal, forward and backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .decay import chunk_decays
from .feature_grads import feature_grads
from .output import chunk_outputs
from .plan import Plan, plan
from .states import chunk_states
from .step_grads import step_grads
from .value_grads import value_grads


def quasiseparable_forward(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor,
    ids: Tensor | None = None, diagonal: Tensor | None = None, how: Plan | None = None,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P) for x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N), ids (B, L), diagonal (B, L, H).

    The causal triangle has dt_f, B_f, C_f, the anticausal one the rest; both are strict (the paper's shift).
    """
    how = plan(x, B_f) if how is None else how
    Q = how.chunk
    decays = chunk_decays(dt_f, dt_b, A, diagonal, Q, folded=x.dtype != torch.float32)
    states = None
    if triton.cdiv(x.shape[1], Q) > 1:
        states = chunk_states(B_f, B_b, x, decays, ids, Q, how.states, how.precision, adjoint=False)
    features = (B_f, C_f, B_b, C_b)
    return chunk_outputs(x, features, decays, ids, states, Q, how.output, how.precision)


def quasiseparable_backward(
    dy: Tensor, x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor,
    ids: Tensor | None = None, diagonal: Tensor | None = None, how: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, dt_f, dt_b, A, B_f, C_f, B_b, C_b and the diagonal; decays and states are computed again."""
    how = plan(x, B_f, backward=True) if how is None else how
    Q, precision = how.chunk, how.precision
    decays = chunk_decays(dt_f, dt_b, A, diagonal, Q, folded=x.dtype != torch.float32)
    states = adjoint = None
    if triton.cdiv(x.shape[1], Q) > 1:
        states = chunk_states(B_f, B_b, x, decays, ids, Q, how.states, precision, adjoint=False)
        adjoint = chunk_states(C_f, C_b, dy, decays, ids, Q, how.states, precision, adjoint=True)
    features = (B_f, C_f, B_b, C_b)
    dx, tiles = value_grads(x, dy, features, decays, ids, adjoint, Q, how.value_grads, precision)
    grads, sums, chunk_products = feature_grads(
        x, dy, features, decays, ids, states, adjoint, tiles, Q, how.feature_grads, precision
    )
    state_sums, products = (None, None) if states is None else (sums, chunk_products)
    ddt_f, ddt_b, dA, ddiagonal = step_grads(dt_f, dt_b, A, diagonal, tiles, state_sums, products, Q)
    return dx, ddt_f, ddt_b, dA, grads[0], grads[1], grads[2], grads[3], ddiagonal
