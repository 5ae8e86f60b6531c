"""The quasiseparable product on a GPU: both strict triangles and the diagonal, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .decay import Decays, Projection, Steps, chunk_decays
from .feature_grads import feature_grads
from .output import chunk_outputs
from .plan import Plan, plan
from .sizes import cdiv
from .states import chunk_states
from .step_grads import step_grads
from .value_grads import value_grads

LONGEST = 1 << 28  # heads are apart by offsets of 32 bits, of up to 8 a token


@dataclass(frozen=True)
class Into:
    """Where the backward pass writes gradients instead of new tensors: views of any strides, the last one unit.

    dB_f, dC_f, dB_b and dC_b go together: their strides are alike.
    """

    dx: Tensor | None = None  # (B, L, H, P)
    ddt_f: Tensor | None = None  # (B, L, H), here the last stride is free as well
    ddt_b: Tensor | None = None
    dB_f: Tensor | None = None  # (B, L, G, N)
    dC_f: Tensor | None = None
    dB_b: Tensor | None = None
    dC_b: Tensor | None = None


def quasiseparable_forward(
    x: Tensor, steps: Steps, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor, ids: Tensor | None = None,
    diagonal: Tensor | None = None, how: Plan | None = None, decays: Decays | None = None, shifted: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y, states): y (B, L, H, P) for x (B, L, H, P), B and C (B, L, G, N), ids (B, L), diagonal (B, L, H).

    The causal triangle has dt_f, B_f, C_f, the anticausal one the rest; neither has a diagonal. shifted: a row is what
    its neighbour's would be with one (the paper's shift); else it reads with its own C, after its own decay. states are
    what the backward pass may take, as (2, B, chunks, H, N, P), or None where one chunk holds everything.
    """
    how = plan(x, B_f) if how is None else how
    if x.shape[1] * x.shape[2] >= LONGEST:
        raise ValueError(f"length times heads must be less than {LONGEST} in one sequence, got {tuple(x.shape)}")
    decays = find_decays(x, steps, ids, diagonal, how, shifted) if decays is None else decays
    features = B_f, C_f, B_b, C_b = _dealt((B_f, C_f, B_b, C_b), how)
    states = _states(x, B_f, B_b, decays, ids, how)
    y = chunk_outputs(x, features, decays, ids, states, how.chunk, how.output, how.precision)
    return y, states


def quasiseparable_backward(
    dy: Tensor, x: Tensor, steps: Steps, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor, ids: Tensor | None = None,
    diagonal: Tensor | None = None, states: Tensor | None = None, how: Plan | None = None, into: Into | None = None,
    decays: Decays | None = None, back: tuple[Tensor, Tensor] | None = None,
    shifted: bool = True,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None
]:  # fmt: skip
    """Gradients of x, dt_f, dt_b, A, bias, B_f, C_f, B_b, C_b and the diagonal.

    Decays and states are computed again where they are not given. Raw steps get the gradients of what is raw. Where the
    diagonal is a projection of x whose gradient is known, `back` takes it to dx (see value_grads) in place of
    `diagonal`, and the decays hold the diagonal.
    """
    how = plan(x, B_f, backward=True) if how is None else how
    into = Into() if into is None else into
    Q, precision = how.chunk, how.precision
    grads = _to(into.dB_f, B_f), _to(into.dC_f, C_f), _to(into.dB_b, B_b), _to(into.dC_b, C_b)
    features = B_f, C_f, B_b, C_b = _dealt((B_f, C_f, B_b, C_b), how)
    decays = find_decays(x, steps, ids, diagonal, how, shifted) if decays is None else decays
    if states is None:
        states = _states(x, B_f, B_b, decays, ids, how)
    elif states.shape[2] != cdiv(x.shape[1], Q):
        raise ValueError(f"saved states must be of chunks of {Q} tokens, got {states.shape[2]} for {x.shape[1]} tokens")
    adjoint = _states(dy, C_f, C_b, decays, ids, how, adjoint=True)
    through = None
    if states is not None:
        assert adjoint is not None
        through = feature_grads(x, dy, features, decays, ids, states, adjoint, Q, how.feature_grads, precision)
    dx = _to(into.dx, x)
    parts = grads
    if how.split > 1:
        new = partial(torch.empty, B_f.shape, dtype=torch.float32, device=x.device)
        parts = new(), new(), new(), new()
    tiles = value_grads(
        x, dy, features, decays, ids, adjoint, through, dx, parts, Q, how.pair, how.value_grads, precision, back
    )
    ddt_f, ddt_b, dA, dbias, ddiagonal = step_grads(
        steps, ids, diagonal, tiles, through, Q, into.ddt_f, into.ddt_b, decays.shifted
    )
    if how.split > 1:
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.sum(2, keepdim=True))
    dB_f, dC_f, dB_b, dC_b = grads
    return dx, ddt_f, ddt_b, dA, dbias, dB_f, dC_f, dB_b, dC_b, ddiagonal


def _dealt(features: tuple[Tensor, Tensor, Tensor, Tensor], how: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The features as several groups that are one in memory, where the plan splits the heads of their group."""
    if how.split == 1:
        return features
    B_f, C_f, B_b, C_b = (t.expand(-1, -1, how.split, -1) for t in features)
    return B_f, C_f, B_b, C_b


def _to(given: Tensor | None, like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if given is None else given


def find_decays(
    x: Tensor, steps: Steps, ids: Tensor | None, diagonal: Tensor | Projection | None, how: Plan, shifted: bool = True
) -> Decays:
    """What the forward and the backward pass of one plan both read of the steps."""
    return chunk_decays(steps, ids, diagonal, how.chunk, x.dtype.itemsize == 2, shifted, how.precision)


def _states(
    v: Tensor, u_f: Tensor, u_b: Tensor, decays: Decays, ids: Tensor | None, how: Plan, adjoint: bool = False
) -> Tensor | None:
    if cdiv(v.shape[1], how.chunk) == 1:
        return None
    return chunk_states(u_f, u_b, v, decays, ids, how.chunk, how.states, how.precision, adjoint)
