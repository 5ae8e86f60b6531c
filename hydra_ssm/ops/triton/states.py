# mypy: disable-error-code="assignment"
# (tuples that grow are Triton's, not Python's)
"""States between chunks: S, which rows read, and its adjoint T, which the backward pass sends the other way.

Per chunk, from the states that enter it (u and v rows of features and values, decays as in decay.py):

    state <- 2^total state + sum_j w_j u_j v_j^T       S: u = B, v = x, w = dt 2^(total - column_j)
                                                       T: u = C of the row's neighbour, v = dy, w = 2^row_j

A program walks over the chunks of one head and direction with the state in registers. Where heads are too few to fill
the device, it walks over a stretch of the chunks: a first kernel finds what each stretch adds, a scan over the
stretches what enters each of them, and the walk starts from there. Then the states of a few stretches can be found
without the others, wherever they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decay import Decays, load_decays, load_weights
from .sizes import cdiv, next_power_of_2
from .tiles import load_borders, load_features

LONG = 16  # chunks of a walk that is worth reading far ahead


@triton.jit
def _weights(decay, steps, total, i, direction, ADJOINT: tl.constexpr, FOLDED: tl.constexpr):
    """What the tokens i count in a state of this direction; decay is of their rows (ADJOINT) or columns."""
    if ADJOINT:
        w = tl.exp2(decay)
    elif FOLDED:
        w = tl.exp2(total - decay)
    else:
        w_f, w_b = load_weights(decay, decay, total, total, steps, i, FOLDED)
        w = tl.where(direction == 0, w_f, w_b)
    return w


@triton.jit(do_not_specialize=["L", "chunks", "stretch", "stretches", "start", "held"])
def _states_kernel(
    u_f,
    u_b,
    v,
    decays,
    steps,
    totals,
    ids,
    states,
    borders,
    L,
    H,
    heads_per_group,
    chunks,
    stretch,
    stretches,
    start,
    held,
    stride_fb,
    stride_fl,
    stride_fg,
    stride_bb,
    stride_bl,
    stride_bg,
    stride_vb,
    stride_vl,
    stride_vh,
    ADJOINT: tl.constexpr,
    NEIGHBOUR: tl.constexpr,
    BORDERS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (B H directions, stretches), of the chunks `held` from `start`: states has room for these."""
    pid = tl.program_id(0)
    direction = pid % 2
    head = pid // 2 % H
    batch = (pid // (2 * H)).to(tl.int64)
    first = start + tl.program_id(1).to(tl.int64) * stretch
    number = first // stretch
    count = tl.minimum(stretch, chunks - first)
    group = head // heads_per_group
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    decays += (batch * H + head) * (chunks * Q * 4)
    steps += (batch * H + head) * (chunks * Q * 8)
    totals += (batch * H + head) * (chunks * 2)
    ids += batch * L
    slot = direction * (tl.num_programs(0) // (2 * H)) + batch  # (direction, batch) as one number
    states += ((slot * held - start) * H + head) * (N * P)
    borders += ((slot * stretches + number) * H + head) * (N * P)
    # One loop for both: what a loop reads ahead has a place of its own, and a second would halve the programs at once.
    forward = direction == 0
    u = tl.where(forward, u_f + batch * stride_fb + group * stride_fg, u_b + batch * stride_bb + group * stride_bg)
    stride_ul = tl.where(forward, stride_fl, stride_bl)
    leftwards = direction != ADJOINT
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    entry = n[:, None] * P + p[None, :]
    if BORDERS:
        state = tl.load(borders + entry)
    else:
        state = tl.zeros([N, P], tl.float32)
    for s in tl.range(0, count, num_stages=STAGES):
        chunk = first + tl.where(leftwards, count - 1 - s, s)
        to = states + chunk * (H * N * P) + entry
        # Written once, read by later kernels: what the other direction still has to read should stay in the cache.
        tl.store(to, state.to(states.dtype.element_ty), eviction_policy="evict_first")
        begin = chunk * Q  # offsets inside the chunk fit into 32 bits: they are many, and registers are few
        limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
        values = v + begin * stride_vl + (i[:, None] * stride_vl + p[None, :])
        values = tl.load(values, mask=(i < limit)[:, None], other=0.0)
        us = load_features(u, i, begin, limit, chunk, stride_ul, n, NEIGHBOUR * (2 * direction - 1))
        total = tl.load(totals + chunk * 2 + direction)
        row_f, row_b, column_f, column_b = load_decays(decays + chunk * Q * 4, i)
        if ADJOINT:
            decay = tl.where(forward, row_f, row_b)
        else:
            decay = tl.where(forward, column_f, column_b)
        w = _weights(decay, steps + chunk * Q * 8, total, i, direction, ADJOINT, FOLDED)
        g = tl.exp2(total)
        if HAS_IDS:
            before, last = load_borders(ids + begin, limit, chunk, direction, Q)
            own = tl.load(ids + begin + i, mask=i < limit, other=-3)
            w = tl.where(own == (before if ADJOINT else last), w, 0.0)
            g = tl.where(before == last, g, 0.0)
        values = (values.to(tl.float32) * w[:, None]).to(us.dtype)
        state = tl.dot(tl.trans(us), values, state * g, input_precision=PRECISION)


@triton.jit(do_not_specialize=["L", "chunks", "stretch"])
def _stretch_kernel(
    u_f,
    u_b,
    v,
    decays,
    steps,
    totals,
    ids,
    borders,
    L,
    H,
    heads_per_group,
    chunks,
    stretch,
    stride_fb,
    stride_fl,
    stride_fg,
    stride_bb,
    stride_bl,
    stride_bg,
    stride_vb,
    stride_vl,
    stride_vh,
    ADJOINT: tl.constexpr,
    NEIGHBOUR: tl.constexpr,
    HAS_IDS: tl.constexpr,
    FOLDED: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each stretch adds to the state of either direction, in one pass from left to right. Grid (B H, stretches).

    Of the direction that leaves at the left (A; the other is R), a chunk's part decays over the chunks before it.
    """
    A: tl.constexpr = 1 - ADJOINT
    head = tl.program_id(0) % H
    batch = (tl.program_id(0) // H).to(tl.int64)
    batches = tl.num_programs(0) // H
    number = tl.program_id(1).to(tl.int64)
    first = number * stretch
    count = tl.minimum(stretch, chunks - first)
    group = head // heads_per_group
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    decays += (batch * H + head) * (chunks * Q * 4)
    steps += (batch * H + head) * (chunks * Q * 8)
    totals += (batch * H + head) * (chunks * 2)
    ids += batch * L
    u_f += batch * stride_fb + group * stride_fg
    u_b += batch * stride_bb + group * stride_bg
    if A == 0:
        u_left, stride_left, u_right, stride_right = u_f, stride_fl, u_b, stride_bl
    else:
        u_left, stride_left, u_right, stride_right = u_b, stride_bl, u_f, stride_fl
    i = tl.arange(0, Q)
    n = tl.arange(0, N)
    p = tl.arange(0, P)
    to_right = tl.zeros([N, P], tl.float32)
    to_left = tl.zeros([N, P], tl.float32)
    run = 0.0
    if HAS_IDS:
        place = first * Q - ADJOINT
        leaves = tl.load(ids + place, mask=place >= 0, other=-2)
    for s in tl.range(0, count, num_stages=1):  # many programs at once are better here than reading ahead
        chunk = first + s
        begin = chunk * Q
        limit = tl.minimum(L - begin, Q + 1).to(tl.int32)
        values = v + begin * stride_vl + (i[:, None] * stride_vl + p[None, :])
        values = tl.load(values, mask=(i < limit)[:, None], other=0.0)
        total_left = tl.load(totals + chunk * 2 + A)
        total_right = tl.load(totals + chunk * 2 + 1 - A)
        row_or_column = decays + (chunk * Q + i) * 4 + (2 - 2 * ADJOINT)
        w_left = tl.load(row_or_column + A)
        w_right = tl.load(row_or_column + 1 - A)
        # Last, as they are waited for where they are loaded: for shared memory. All else is on its way then.
        us_left = load_features(u_left, i, begin, limit, chunk, stride_left, n, NEIGHBOUR * (2 * A - 1))
        us_right = load_features(u_right, i, begin, limit, chunk, stride_right, n, NEIGHBOUR * (1 - 2 * A))
        w_left = _weights(w_left, steps + chunk * Q * 8, total_left, i, A, ADJOINT, FOLDED)
        w_right = _weights(w_right, steps + chunk * Q * 8, total_right, i, 1 - A, ADJOINT, FOLDED)
        w_left *= tl.exp2(run)
        g = tl.exp2(total_right)
        if HAS_IDS:
            before, last = load_borders(ids + begin, limit, chunk, 1 - A, Q)
            own = tl.load(ids + begin + i, mask=i < limit, other=-3)
            w_left = tl.where(own == leaves, w_left, 0.0)
            w_right = tl.where(own == (before if ADJOINT else last), w_right, 0.0)
            g = tl.where(before == last, g, 0.0)
        wide = values.to(tl.float32)
        to_left = tl.dot(
            tl.trans(us_left), (wide * w_left[:, None]).to(us_left.dtype), to_left, input_precision=PRECISION
        )
        to_right = tl.dot(
            tl.trans(us_right), (wide * w_right[:, None]).to(us_right.dtype), to_right * g, input_precision=PRECISION
        )
        run += total_left
    entry = n[:, None] * P + p[None, :]
    slot = A * batches + batch
    tl.store(borders + ((slot * tl.num_programs(1) + number) * H + head) * (N * P) + entry, to_left)
    slot = (1 - A) * batches + batch
    tl.store(borders + ((slot * tl.num_programs(1) + number) * H + head) * (N * P) + entry, to_right)


@triton.jit(do_not_specialize=["L", "chunks", "stretch"])
def _join_kernel(
    borders,
    totals,
    ids,
    L,
    H,
    chunks,
    stretch,
    ADJOINT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    Q: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """In place, from what each stretch adds to the state that enters it. Grid (2 B H, parts of N P)."""
    slot = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.num_programs(0) // (2 * H)
    direction, batch = slot // size, slot % size
    totals += (batch * H + head) * (chunks * 2) + direction
    ids += batch * L
    stretches = tl.cdiv(chunks, stretch)
    c = tl.arange(0, CHUNKS)
    state = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stretches, AHEAD):  # so many are loaded before anything is stored: no load is moved over that
        places = ()
        owns = ()
        decayed = ()
        passes = ()
        for k in tl.static_range(AHEAD):
            number = tl.where(direction == ADJOINT, start + k, stretches - 1 - start - k)
            there = start + k < stretches
            first = number * stretch
            end = tl.minimum(first + stretch, chunks)
            place = borders + ((slot * stretches + number) * H + head) * SIZE + entry
            places = places + (place,)
            owns = owns + (tl.load(place, mask=there, other=0.0),)
            decayed = decayed + (tl.load(totals + (first + c) * 2, mask=there & (first + c < end), other=0.0),)
            if HAS_IDS:
                after = tl.minimum(end * Q, L)
                before = tl.where(direction == 0, first * Q - 1, after)
                inside = there & (before >= 0) & (before < L)
                before = tl.load(ids + before, mask=inside, other=-2)
                last = tl.load(ids + tl.where(direction == 0, after - 1, first * Q), mask=there, other=-3)
                passes = passes + (before == last,)
        for k in tl.static_range(AHEAD):
            tl.store(places[k], state, mask=start + k < stretches)
            g = tl.exp2(tl.sum(decayed[k]))
            if HAS_IDS:
                g = tl.where(passes[k], g, 0.0)
            state = state * g + owns[k]


@dataclass(frozen=True)
class StatesConfig:
    """Chunks of a stretch (0: all of them in one walk), warps, and how many chunks a walk reads ahead, as stages."""

    stretch: int = 0
    warps: int = 4
    stages: int = 2
    deep: int = 0  # stages where a multiprocessor goes through few long walks at once; 0: as everywhere
    processors: int = 1 << 30  # multiprocessors of the device

    def length(self, chunks: int) -> int:
        """Chunks of a stretch, where there are so many."""
        return self.stretch if 0 < self.stretch < chunks else chunks

    def ahead(self, walks: int, length: int) -> int:
        """Stages of so many walks. With deep ones a multiprocessor has room for one walk or two: what one direction has
        read is then still in the cache when the other comes by. But not if that takes a second wave, or very many.
        """
        few = walks <= self.processors or 2 * self.processors < walks < 8 * self.processors
        return self.deep if self.deep and length >= LONG and few else self.stages


def _launch(
    u_f: Tensor, u_b: Tensor, v: Tensor, decays: Decays, ids: Tensor | None, Q: int, config: StatesConfig,
    precision: str, adjoint: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]:  # fmt: skip
    """What the kernels take: tensors, sizes, strides and constants."""
    L, H = v.shape[1:3]
    inputs = (
        u_f, u_b, v, decays.sums, decays.sums if decays.steps is None else decays.steps, decays.totals,
        v if ids is None else ids,
    )  # fmt: skip
    options = {
        "ADJOINT": int(adjoint), "NEIGHBOUR": int(adjoint and decays.shifted), "HAS_IDS": ids is not None,
        "FOLDED": decays.steps is None, "Q": Q, "N": u_f.shape[3], "P": v.shape[3], "PRECISION": precision,
        "num_warps": config.warps,
    }  # fmt: skip
    strides = (*u_f.stride()[:3], *u_b.stride()[:3], *v.stride()[:3])
    return inputs, (L, H, H // u_f.shape[2], cdiv(L, Q), config.length(cdiv(L, Q))), strides, options


def stretch_borders(
    u_f: Tensor, u_b: Tensor, v: Tensor, decays: Decays, ids: Tensor | None, Q: int, config: StatesConfig,
    precision: str, adjoint: bool,
) -> Tensor | None:  # fmt: skip
    """(2, B, stretches, H, N, P) float32, the states that enter each stretch; None where there is one. See below."""
    batch, L, H, P = v.shape
    N = u_f.shape[3]
    chunks = cdiv(L, Q)
    stretch = config.length(chunks)
    stretches = cdiv(chunks, stretch)
    if stretches == 1:
        return None
    inputs, sizes, strides, options = _launch(u_f, u_b, v, decays, ids, Q, config, precision, adjoint)
    borders = torch.empty(2, batch, stretches, H, N, P, dtype=torch.float32, device=v.device)
    _stretch_kernel[batch * H, stretches](*inputs, borders, *sizes, *strides, **options)
    part = min(N * P, 256)
    _join_kernel[2 * batch * H, N * P // part](
        borders, decays.totals, inputs[-1], L, H, chunks, stretch, ADJOINT=int(adjoint), HAS_IDS=ids is not None,
        Q=Q, SIZE=N * P, BLOCK=part, CHUNKS=next_power_of_2(stretch), AHEAD=4, num_warps=1,
    )  # fmt: skip
    return borders


def chunk_states(
    u_f: Tensor, u_b: Tensor, v: Tensor, decays: Decays, ids: Tensor | None, Q: int, config: StatesConfig,
    precision: str, adjoint: bool, borders: Tensor | None = None, some: range | None = None,
) -> Tensor:  # fmt: skip
    """The states (2, B, chunks, H, N, P) in the dtype of v that enter each chunk, in each direction's reading order.

    u (B, L, G, N) features and v (B, L, H, P) values with unit last strides; the adjoint of shifted rows reads u one
    row off. borders: what `stretch_borders` finds, if it is known. some: the chunks whose states are wanted, from the
    first of a stretch to the last of one; None: all.
    """
    if borders is None:
        borders = stretch_borders(u_f, u_b, v, decays, ids, Q, config, precision, adjoint)
    batch, L, H, P = v.shape
    some = range(cdiv(L, Q)) if some is None else some
    inputs, sizes, strides, options = _launch(u_f, u_b, v, decays, ids, Q, config, precision, adjoint)
    stretch = sizes[-1]
    grid = 2 * batch * H, cdiv(len(some), stretch)
    states = torch.empty(2, batch, len(some), H, u_f.shape[3], P, dtype=v.dtype, device=v.device)
    _states_kernel[grid](
        *inputs, states, decays.sums if borders is None else borders, *sizes, 1 if borders is None else
        borders.shape[2], some.start, len(some), *strides, BORDERS=borders is not None,
        STAGES=config.ahead(grid[0] * grid[1], stretch), **options,
    )  # fmt: skip
    return states
