"""All of the Hydra layer between its projections, as kernels: what is projected goes in, what is normed comes out.

    projected = z | x | B_f C_f | B_b C_b | dt_f dt_b
    xBC, d = SiLU(conv(...)), W_D x + D      y = M x      normed = RMSNorm(y) * SiLU(z)

The backward pass writes the gradient of each part where it belongs in that of `projected`: nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._autograd import without_autocast
from ..linear import is_spent, product
from .conv import conv_backward, conv_forward
from .decay import Decays, Projection, Steps
from .library import differentiable_once, packed, register, where_it_lies
from .norm import NormGrads, norm_backward, norm_forward
from .plan import Plan, plan
from .product import Four, Into, find_decays, outputs_in_parts, quasiseparable_backward, quasiseparable_forward
from .sizes import cdiv


class Sizes(NamedTuple):
    """Heads H, their width P, groups G and state N."""

    heads: int
    headdim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.headdim

    @property
    def features(self) -> int:
        return self.groups * self.state

    def parts(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z, what passes the convolution, dt_f and dt_b: views."""
        inner, heads = self.inner, self.heads
        z, wet, dt_f, dt_b = projected.split_with_sizes([inner, inner + 4 * self.features, heads, heads], -1)
        return z, wet, dt_f, dt_b

    def values_and_features(self, wet: Tensor) -> tuple[Tensor, Four]:
        """x (B, L, H, P) and B_f, C_f, B_b, C_b (B, L, G, N): views."""
        x, features = wet.split_with_sizes([self.inner, 4 * self.features], -1)
        B_f, C_f, B_b, C_b = features.unflatten(-1, (4, self.groups, self.state)).unbind(2)
        return x.unflatten(-1, (self.heads, self.headdim)), (B_f, C_f, B_b, C_b)


class Weights(NamedTuple):
    """The layer's parameters between the projections, under their names there."""

    conv: Tensor  # (C, 1, width)
    conv_bias: Tensor | None  # (C,)
    dt_bias: Tensor  # (H,)
    A_log: Tensor  # (H,)
    D: Tensor  # (H,)
    fc_D: Tensor  # (H, inner)
    norm: Tensor  # (inner,)


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass, or finds again."""

    xBC: Tensor  # (B, L, C)
    y: Tensor | None  # (B, L, inner)
    rstd: Tensor  # (B, L)
    states: Tensor | None  # (2, B, chunks, H, N, P)
    sums: Tensor  # the decays, see decay.py
    steps: Tensor | None
    totals: Tensor
    diagonal: Tensor
    cast: Tensor | None  # fc_D (H, inner) as the diagonal's product took it, where that is another tensor

    @property
    def decays(self) -> Decays:
        return Decays(self.sums, self.steps, self.totals, self.diagonal)


MOST_HEADS = 128  # beyond, a tile of all heads does not fit beside the others of a kernel
RECOMPUTED = 8192  # tokens whose forward pass is found again at once: enough to fill a GPU, few for its memory
OF_ONE = 4096  # the same where one sequence has more: all of its x, B, C and decays are there beside them
PARTS = 8  # or so many of a row that is longer still: of what it holds, one of them is little


class Operands(NamedTuple):
    """Of the product: views of x, B and C after the convolution, and the decays; and the gate."""

    z: Tensor  # (B, L, inner)
    xBC: Tensor  # (B, L, C)
    x: Tensor  # (B, L, H, P)
    features: Four  # (B, L, G, N)
    steps: Steps
    decays: Decays
    fc_D: Tensor
    how: Plan


def _operands(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], ids: Tensor | None, backward: bool
) -> Operands:
    z, wet, dt_f, dt_b = sizes.parts(projected)
    xBC = conv_forward(wet, weights.conv, weights.conv_bias, ids, True)
    x, features = sizes.values_and_features(xBC)
    steps = Steps(dt_f, dt_b, weights.A_log, weights.dt_bias, limits)
    how = plan(x, features[0], backward=backward)
    projection = Projection(x.flatten(2), weights.fc_D, weights.D)
    projection = projection if how.project else projection.multiplied()
    decays = find_decays(x, steps, ids, projection, how)
    return Operands(z, xBC, x, features, steps, decays, projection.weight, how)


def block_forward(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], eps: float, ids: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Kept]:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, 2 inner + 4 G N + 2 H).

    keep: what is kept serves the backward pass; else normed takes the place of y.
    """
    of = _operands(projected, weights, sizes, limits, ids, keep)
    y, states = quasiseparable_forward(of.x, of.steps, *of.features, ids, None, of.how, of.decays)
    y = y.flatten(2)
    normed, rstd = norm_forward(y, of.z, weights.norm, eps, out=None if keep else y)
    return normed, _kept(of, weights, y, rstd, states)


def _kept(of: Operands, weights: Weights, y: Tensor | None, rstd: Tensor, states: Tensor | None) -> Kept:
    sums, steps, totals, diagonal, _ = of.decays
    assert diagonal is not None
    cast = None if of.fc_D is weights.fc_D else of.fc_D
    return Kept(of.xBC, y, rstd, states, sums, steps, totals, diagonal, cast)


def _again(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], ids: Tensor | None, rstd: Tensor
) -> Kept:
    """What the forward pass had, found again; of a long row without y and the states, which follow in parts."""
    of = _operands(projected, weights, sizes, limits, ids, True)
    if projected.shape[1] > RECOMPUTED:
        return _kept(of, weights, None, rstd, None)
    y, states = quasiseparable_forward(of.x, of.steps, *of.features, ids, None, of.how, of.decays)
    return _kept(of, weights, y.flatten(2), rstd, states)


def block_backward(
    dnormed: Tensor, projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float],
    ids: Tensor | None, kept: Kept, dprojected: Tensor, reuse: bool, spent: bool = False,
) -> Weights:  # fmt: skip
    """Writes dprojected, which may be projected; returns the gradients of the weights.

    reuse: what is kept is written over, y by its gradient, x, B and C by theirs, decays by sums. spent: nobody else
    reads dnormed: its memory is used, or given back once it has been read.
    """
    parts, operands = sizes.parts(projected), sizes.values_and_features(kept.xBC)
    (z, wet, dt_f, dt_b), (x, features) = parts, operands
    dz, dwet, ddt_f, ddt_b = parts if dprojected is projected else sizes.parts(dprojected)
    dxBC = kept.xBC if reuse else torch.empty_like(kept.xBC)
    dx, dfeatures = operands if reuse else sizes.values_and_features(dxBC)
    how = plan(x, features[0], backward=True)
    if kept.y is None:
        held, stretch = (cdiv(tokens, how.chunk) for tokens in (max(OF_ONE, projected.shape[1] // PARTS), OF_ONE))
        how = replace(how, held=held, states=replace(how.states, stretch=stretch))
    dy, norm = _norm_gradients(dnormed, z, x, features, weights.norm, ids, kept, dz, how, reuse, spent)
    assert norm.diagonal is not None
    assert norm.diagonal_sum is not None
    ddiagonal = norm.diagonal.flatten(0, 1)
    dfc_D = product(ddiagonal.t(), x.reshape(-1, sizes.inner))
    steps = Steps(dt_f, dt_b, weights.A_log, weights.dt_bias, limits)
    fc_D = weights.fc_D.to(x.dtype) if kept.cast is None else kept.cast
    few = sizes.heads <= MOST_HEADS
    _, _, _, dA_log, ddt_bias, *_ = quasiseparable_backward(
        dy.unflatten(-1, (sizes.heads, sizes.headdim)), x, steps, *features, ids, None, kept.states, how,
        Into(dx, ddt_f, ddt_b, *dfeatures), kept.decays, (norm.diagonal, fc_D) if few else None, spent=reuse,
    )  # fmt: skip
    assert ddt_bias is not None
    if not few:
        dx.flatten(2).flatten(0, 1).addmm_(ddiagonal, fc_D)
    dconv, dconv_bias = conv_backward(dxBC, wet, weights.conv, weights.conv_bias, ids, True, dwet)
    dD = norm.diagonal_sum.to(weights.D.dtype)
    return Weights(dconv, dconv_bias, ddt_bias, dA_log, dD, dfc_D.to(weights.fc_D.dtype), norm.weight)


def _norm_gradients(
    dnormed: Tensor, z: Tensor, x: Tensor, features: Four, weight: Tensor, ids: Tensor | None, kept: Kept, dz: Tensor,
    how: Plan, reuse: bool, spent: bool,
) -> tuple[Tensor, NormGrads]:  # fmt: skip
    """dy (B, L, inner) and what else the norm's backward pass finds; writes dz."""
    if kept.y is not None:
        dy = kept.y if reuse else torch.empty_like(kept.y)
        norm = norm_backward(dnormed, kept.y, z, weight, kept.rstd, dy, dz, x)
        if spent and dnormed.untyped_storage().nbytes() == dnormed.nbytes:
            dnormed.untyped_storage().resize_(0)
        return dy, norm
    dy, found = dnormed if spent else torch.empty_like(dnormed), []
    for some, y in outputs_in_parts(x, features, kept.decays, ids, how):
        own, own_z, rstd, to, to_z, values = (t[:, some] for t in (dnormed, z, kept.rstd, dy, dz, x))
        found.append(norm_backward(own, y.flatten(2), own_z, weight, rstd, to, to_z, values))
    return dy, _joined(found)


def _joined(parts: list[NormGrads]) -> NormGrads:
    """Of the parts of a row."""
    if len(parts) == 1:
        return parts[0]
    weight, diagonal, diagonal_sum = zip(*((p.weight, p.diagonal, p.diagonal_sum) for p in parts), strict=True)
    return NormGrads(torch.stack(weight).sum(0), torch.cat(diagonal, 1), torch.stack(diagonal_sum).sum(0))


def block(
    projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float], eps: float,
    ids: Tensor | None = None, *, recompute: bool = False, reuse: bool = False,
) -> Tensor:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, 2 inner + 4 G N + 2 H) in its dtype, differentiable once.

    ids (B, L) number the documents, -1 is padding. recompute: the backward pass finds again what it needs of the
    forward pass, instead of keeping it. reuse: nobody else reads projected: its gradient may take its place.
    """
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (projected, *weights))
    keep = needed and not recompute
    return torch.ops.hydra_ssm.block(projected, *weights, ids, list(sizes), *limits, eps, 1 + reuse, keep)[0]


INPUTS = (
    "Tensor projected, Tensor conv, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, Tensor fc_D, "
    "Tensor norm, Tensor? ids, int[] sizes, float low, float high, float eps"
)
KEPT = (
    "Tensor xBC, Tensor y, Tensor rstd, Tensor states, Tensor sums, Tensor steps, Tensor totals, Tensor diagonal, "
    "Tensor cast"
)


def _forward(projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """normed, then what is kept, empty where nothing is."""
    *given, shape, low, high, eps, _, keep = inputs
    *values, ids = packed(*given)
    normed, kept = block_forward(projected, Weights(*values), Sizes(*shape), (low, high), eps, ids, keep)
    tensors = kept if keep else (kept.rstd if name == "rstd" else None for name in Kept._fields)
    return normed, *(projected.new_empty(0) if t is None else t for t in tensors)


def _fake_forward(projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *_, shape, _, _, _, _, keep = inputs
    sizes = Sizes(*shape)
    batch, L, _ = projected.shape
    new, wide = projected.new_empty, partial(projected.new_empty, dtype=torch.float32)
    y, H = (batch, L, sizes.inner), sizes.heads
    if not keep:
        return new(y), *(wide(batch, L) if name == "rstd" else new(0) for name in Kept._fields)
    xBC = new(batch, L, sizes.inner + 4 * sizes.features)
    x, features = sizes.values_and_features(xBC)
    how = plan(x, features[0], backward=True)
    Q, fc_D = how.chunk, inputs[5]
    chunks = cdiv(L, Q)
    states = new((2, batch, chunks, H, sizes.state, sizes.headdim) if chunks > 1 else 0)
    steps = wide(batch, H, chunks * Q, 8) if x.dtype == torch.float32 else new(0)
    decays = wide(batch, H, chunks * Q, 4), steps, wide(batch, H, chunks, 2), wide(batch, H, chunks * Q)
    cast = new(0) if how.project or fc_D.dtype == x.dtype else new(fc_D.shape)
    return new(y), xBC, new(y), wide(batch, L), states, *decays, cast


def _backward(dnormed: Tensor, projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """The gradients of projected and of the weights in their order, empty for the one that is None."""
    found, grads = _gradients(dnormed, projected, projected.new_empty(projected.shape), False, *inputs)
    return found, *(projected.new_empty(0) if g is None else g for g in grads)


def _gradients(
    dnormed: Tensor, projected: Tensor, dprojected: Tensor, reuse: bool, *inputs: Any
) -> tuple[Tensor, Weights]:
    """dprojected and the gradients of the weights.

    reuse: what is kept may be written over, and dnormed given back if it says that nobody else has it.
    """
    spent = reuse and is_spent(dnormed)
    *tensors, shape, low, high, _ = inputs[: -len(Kept._fields)]
    *values, ids = packed(*tensors)
    kept: list[Any] = [t if t.numel() else None for t in inputs[-len(Kept._fields) :]]
    gradients = _gradients_found_again if kept[0] is None else block_backward
    with without_autocast(projected.device):  # the forward pass has already chosen
        return dprojected, gradients(
            dnormed.contiguous(), projected, Weights(*values), Sizes(*shape), (low, high), ids, Kept(*kept), dprojected,
            reuse, spent,
        )  # fmt: skip


def _gradients_found_again(
    dnormed: Tensor, projected: Tensor, weights: Weights, sizes: Sizes, limits: tuple[float, float],
    ids: Tensor | None, kept: Kept, dprojected: Tensor, reuse: bool, spent: bool,
) -> Weights:  # fmt: skip
    """As block_backward, with what the forward pass had found again, for some rows of the batch at a time."""
    batch, L, _ = projected.shape
    size = max(1, RECOMPUTED // L)
    # Gradients that are added up are so in float32, which they have if the weights do.
    whole = size >= batch and L <= RECOMPUTED
    given: list[Any] = [t if t is None or whole else t.float() for t in weights]
    used, sums = Weights(*given), list[Any]()
    for rows in (slice(start, start + size) for start in range(0, batch, size)):
        part, own_ids = projected[rows], None if ids is None else ids[rows]
        again = _again(part, used, sizes, limits, own_ids, kept.rstd[rows])
        to = part if dprojected is projected else dprojected[rows]
        grads = block_backward(dnormed[rows], part, used, sizes, limits, own_ids, again, to, True, spent)
        del again  # before the next is found
        sums = [a if b is None else a + b for a, b in zip(grads, sums, strict=True)] if sums else [*grads]
    given = [None if t is None else g.to(t.dtype) for g, t in zip(sums, weights, strict=True)]
    return Weights(*given)


def _fake_backward(dnormed: Tensor, projected: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    new = [projected.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[:7]]
    return projected.new_empty(projected.shape), *new


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
    *tensors, shape, low, high, eps, spent, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros as large as all that is kept would be written, to be thrown away
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.options, ctx.spent = (shape, low, high, eps), spent


def _differentiate(ctx: Any, dnormed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dnormed is None:
        return (None,) * 15
    projected, *tensors = ctx.saved_tensors
    values, kept = tensors[:8], tensors[8:]
    # What is saved may be written over if no second backward pass can ask for it; a compiler plans memory itself.
    once = not (torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph())
    if once and ctx.spent and type(projected) is Tensor:
        own = projected.detach()
        to = own if ctx.spent == 2 else own.new_empty(own.shape)
        dprojected, grads = where_it_lies(_gradients, dnormed, own, to, True, *values, *ctx.options, *kept)
        xBC, y, _, _, decays, *_ = kept
        torch.autograd.graph.increment_version([projected, xBC, y, decays][2 - ctx.spent :])
        return dprojected, *grads, *[None] * 7
    found = torch.ops.hydra_ssm.block_backward(dnormed, projected, *values, *ctx.options, *kept)
    given = (projected, *values[:7])
    return *(None if t is None else g for g, t in zip(found, given, strict=True)), *[None] * 7


register(
    # spent: what the backward pass may write over. 0: nothing, 1: what is kept, unseen by the caller, 2: projected too
    "block", f"({INPUTS}, int spent, bool keep) -> ({', '.join(['Tensor'] * 10)})",
    _forward, _fake_forward, _differentiate, _save,
)  # fmt: skip
register(
    "block_backward", f"(Tensor dnormed, {INPUTS}, {KEPT}) -> ({', '.join(['Tensor'] * 8)})",
    _backward, _fake_backward, differentiable_once,
)  # fmt: skip
