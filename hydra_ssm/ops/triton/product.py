"""The quasiseparable product on a GPU: both strict triangles and the diagonal, forward and backward."""

from __future__ import annotations

import triton
from torch import Tensor

from .decay import decay_sums
from .output import chunk_outputs
from .plan import Plan, plan
from .states import chunk_states


def quasiseparable_forward(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor,
    ids: Tensor | None = None, diagonal: Tensor | None = None, how: Plan | None = None,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P) for x (B, L, H, P), dt (B, L, H), A (H,), B and C (B, L, G, N), ids (B, L), diagonal (B, L, H).

    The causal triangle has dt_f, B_f, C_f, the anticausal one the rest; both are strict (the paper's shift).
    """
    how = plan(x, B_f) if how is None else how
    Q = how.chunk
    sums, steps = decay_sums(dt_f, dt_b, A, Q)
    states = None
    if triton.cdiv(x.shape[1], Q) > 1:
        states = chunk_states(B_f, B_b, x, sums, steps, ids, Q, how.states, how.precision, adjoint=False)
    features = (B_f, C_f, B_b, C_b)
    return chunk_outputs(x, features, sums, steps, ids, diagonal, states, Q, how.output, how.precision)
