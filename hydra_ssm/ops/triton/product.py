"""The quasiseparable product on a GPU: both strict triangles and the diagonal, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .decay import Decays, Projection, Steps, chunk_decays
from .feature_grads import StateSums, feature_grads
from .output import chunk_outputs
from .plan import Plan, plan, stretch_of
from .sizes import cdiv
from .states import chunk_states, stretch_borders
from .step_grads import StepGrads, step_grads
from .value_grads import TileSums, value_grads

Four = tuple[Tensor, Tensor, Tensor, Tensor]  # of B_f, C_f, B_b, C_b, or their gradients
LONGEST = 1 << 28  # heads are apart by offsets of 32 bits, of up to 8 a token


class Into(NamedTuple):
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
    shifted: bool = True, spent: bool = False,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor | None
]:  # fmt: skip
    """Gradients of x, dt_f, dt_b, A, bias, B_f, C_f, B_b, C_b and the diagonal.

    Decays and states are computed again where they are not given. Raw steps get the gradients of what is raw. Where the
    diagonal is a projection of x whose gradient is known, `back` takes it to dx (see value_grads) in place of
    `diagonal`, and the decays hold the diagonal. spent: the decays may be written over.
    """
    how = plan(x, B_f, backward=True) if how is None else how
    into = Into() if into is None else into
    grads = _to(into.dB_f, B_f), _to(into.dC_f, C_f), _to(into.dB_b, B_b), _to(into.dC_b, C_b)
    features = B_f, C_f, B_b, C_b = _dealt((B_f, C_f, B_b, C_b), how)
    spent |= decays is None
    decays = find_decays(x, steps, ids, diagonal, how, shifted) if decays is None else decays
    if states is not None and states.shape[2] != cdiv(x.shape[1], how.chunk):
        raise ValueError(
            f"saved states must be of chunks of {how.chunk} tokens, got {states.shape[2]} for {x.shape[1]} tokens"
        )
    dx = _to(into.dx, x)
    parts = grads
    if how.split > 1:
        new = partial(torch.empty, B_f.shape, dtype=torch.float32, device=x.device)
        parts = new(), new(), new(), new()
    chunks = cdiv(x.shape[1], how.chunk)
    pieces = _rows(x.shape[0], chunks, how)
    tiles = TileSums.of(decays, how.pair and chunks == 1, back is None, over=spent)
    of_states = StateSums.of(decays) if chunks > 1 else None
    if len(pieces) == 1:
        _backward_of(dy, x, features, decays, ids, states, how, dx, parts, tiles, of_states, back)
    else:
        if len(pieces) == x.shape[0] and how.states.stretch == 0:  # of each row alone walks may be few
            own = stretch_of(x.shape[2], chunks > how.held)
            how = replace(how, states=replace(how.states, stretch=own))
        for rows in pieces:
            _backward_of(
                dy[rows], x[rows], _each(features, rows), decays.of(rows), None if ids is None else ids[rows],
                None if states is None else states[:, rows], how, dx[rows], _each(parts, rows), tiles.cut(rows),
                None if of_states is None else of_states.cut(rows), None if back is None else (back[0][rows], back[1]),
            )  # fmt: skip
    of_steps = StepGrads.of(steps, diagonal, how.chunk, into.ddt_f, into.ddt_b)
    step_grads(steps, ids, tiles, of_states, how.chunk, of_steps, decays.shifted)
    dA, dbias = of_steps.summed(steps)
    if how.split > 1:
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.sum(2, keepdim=True))
    dB_f, dC_f, dB_b, dC_b = grads
    return dx, of_steps.ddt_f, of_steps.ddt_b, dA, dbias, dB_f, dC_f, dB_b, dC_b, of_steps.ddiagonal


def _backward_of(
    dy: Tensor, x: Tensor, features: Four, decays: Decays, ids: Tensor | None, states: Tensor | None, how: Plan,
    dx: Tensor, dfeatures: Four, tiles: TileSums, of_states: StateSums | None, back: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Writes the gradients of values and features of these rows of the batch, and the sums for those of the steps.

    Of a row alone in parts: T (and S) are there for one. A part writes its own tokens' gradients and reads no values or
    features of another's: parts change no bit, and gradients may be where values and features are.
    """
    Q, precision = how.chunk, how.precision
    walk = features[1], features[3], dy, decays, ids, Q, how.states, precision, True
    own_walk = features[0], features[2], x, decays, ids, Q, how.states, precision, False
    borders = None if of_states is None else stretch_borders(*walk)
    own_borders = stretch_borders(*own_walk) if of_states is not None and states is None else None
    for some in _spans(x.shape[0], cdiv(x.shape[1], Q), how):
        adjoint = through = None  # what the part before had is free
        if of_states is not None:
            own = chunk_states(*own_walk, own_borders, some) if states is None else states[:, :, some.start : some.stop]
            adjoint = chunk_states(*walk, borders, some)
            through = feature_grads(
                x, dy, features, decays, ids, own, adjoint, of_states, Q, how.feature_grads, precision, some.start
            )
            del own  # its memory is for what follows
        value_grads(
            x, dy, features, decays, ids, adjoint, through, dx, dfeatures, tiles, Q, how.value_grads, precision, back,
            some.start,
        )  # fmt: skip


def outputs_in_parts(
    x: Tensor, features: Sequence[Tensor], decays: Decays, ids: Tensor | None, how: Plan
) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, y (1, tokens, H, P)) of x (1, L, H, P), in the parts that the states are held for."""
    B_f, C_f, B_b, C_b = features
    spans = _spans(1, cdiv(x.shape[1], how.chunk), how)
    walk = B_f, B_b, x, decays, ids, how.chunk, how.states, how.precision, False
    borders = stretch_borders(*walk)
    for some in spans:
        states = chunk_states(*walk, borders, some)
        y = chunk_outputs(
            x, (B_f, C_f, B_b, C_b), decays, ids, states, how.chunk, how.output, how.precision, some.start
        )
        first = some.start * how.chunk
        yield slice(first, first + y.shape[1]), y
        del states, y


def _rows(batch: int, chunks: int, how: Plan) -> list[slice]:
    """Rows of the batch, about as many at a time, with so many chunks in all as are held; each alone if it has more."""
    size = batch if chunks == 1 else cdiv(batch, min(batch, cdiv(batch * chunks, how.held)))
    return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


def _spans(batch: int, chunks: int, how: Plan) -> list[range]:
    """Whole stretches of a row alone, about as many at a time, with as many chunks as are held."""
    stretch = how.states.length(chunks)
    stretches = cdiv(chunks, stretch) if batch == 1 else 1
    size = stretch * cdiv(stretches, min(stretches, cdiv(chunks, how.held))) if stretches > 1 else chunks
    return [range(first, min(first + size, chunks)) for first in range(0, chunks, size)]


def _each(four: Four, rows: slice) -> Four:
    a, b, c, d = (t[rows] for t in four)
    return a, b, c, d


def _dealt(features: Four, how: Plan) -> Four:
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


def _states(x: Tensor, B_f: Tensor, B_b: Tensor, decays: Decays, ids: Tensor | None, how: Plan) -> Tensor | None:
    if cdiv(x.shape[1], how.chunk) == 1:
        return None
    walk = B_f, B_b, x, decays, ids, how.chunk, how.states, how.precision, False
    return chunk_states(*walk)
