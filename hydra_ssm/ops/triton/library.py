"""The product as a PyTorch operator: what autograd, autocast, torch.compile and export see of the kernels.

Its backward pass is an operator as well, without gradients of its own: the product is differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .decay import Steps
from .plan import plan
from .product import quasiseparable_backward, quasiseparable_forward
from .sizes import cdiv

LIBRARY = Library("hydra_ssm", "FRAGMENT")  # the operators live as long as this object


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    differentiate: Callable[..., Any],
    save: Callable[..., None] | None = None,
) -> None:
    """Make hydra_ssm::name an operator; the last four as torch.library.custom_op and its registrations take them.

    Those would cost 100 microseconds a call more, in checks and lookups of the schema.
    """
    # Inductor pads rows of odd widths, and would copy them back to their strides for an operator that needs these.
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    LIBRARY.impl(name, partial(where_it_lies, kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"hydra_ssm::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.hydra_ssm, name).default

    def below(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            output = below(keyset, *inputs)
            if save is not None:
                save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *differentiate(ctx, *grads)

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiable.apply(keyset, *inputs)
        return below(keyset, *inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)


def where_it_lies(f: Callable[..., Any], first: Tensor, *rest: Any) -> Any:
    """f(first, *rest) with the device of the first tensor as the current one: Triton launches there."""
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return f(first, *rest)
    return f(first, *rest)


def packed(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors that kernels read without strides."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def differentiable_once(ctx: Any, *grads: Any) -> Any:
    """The `differentiate` of a backward pass."""
    raise RuntimeError("the Triton kernels are differentiable once: gradients of gradients need impl='dense'")


def quasiseparable(
    x: Tensor, steps: Steps, B_f: Tensor, C_f: Tensor, B_b: Tensor, C_b: Tensor, ids: Tensor | None = None,
    diagonal: Tensor | None = None, *, shifted: bool = True, recompute: bool = False,
) -> Tensor:  # fmt: skip
    """y (B, L, H, P) for x (B, L, H, P), B and C (B, L, G, N), ids (B, L), diagonal (B, L, H); see product.py.

    x, B and C may be slices of one projection; they are taken in the dtype of autocast or, without it, that of x.
    recompute: find the states between chunks again in the backward pass instead of keeping them.
    """
    dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x, B_f, C_f, B_b, C_b = (t.to(dtype) for t in (x, B_f, C_f, B_b, C_b))
    inputs = (x, steps.dt_f, steps.dt_b, steps.A, steps.bias, B_f, C_f, B_b, C_b, ids, diagonal)
    keep = not recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return torch.ops.hydra_ssm.quasiseparable(*inputs, *steps.limits, shifted, keep)[0]


INPUTS = (
    "Tensor x, Tensor dt_f, Tensor dt_b, Tensor A, Tensor? bias, Tensor B_f, Tensor C_f, Tensor B_b, Tensor C_b, "
    "Tensor? ids, Tensor? diagonal, float low, float high, bool shifted"
)


def _forward(
    x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, bias: Tensor | None, B_f: Tensor, C_f: Tensor, B_b: Tensor,
    C_b: Tensor, ids: Tensor | None, diagonal: Tensor | None, low: float, high: float, shifted: bool, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, states); the latter empty where there are none, or nothing is kept."""
    x, B_f, C_f, B_b, C_b = map(_with_rows, (x, B_f, C_f, B_b, C_b))
    A, bias, ids = packed(A, bias, ids)
    steps, how = Steps(dt_f, dt_b, A, bias, (low, high)), plan(x, B_f, backward=keep)
    y, states = quasiseparable_forward(x, steps, B_f, C_f, B_b, C_b, ids, diagonal, how, shifted=shifted)
    return y, states if keep and states is not None else x.new_empty(0)


def _fake_forward(x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    B, keep = inputs[4], inputs[-1]
    batch, L, H, P = x.shape
    chunks = cdiv(L, plan(x, B, backward=keep).chunk)
    states = (2, batch, chunks, H, B.shape[3], P) if keep and chunks > 1 else 0
    return x.new_empty(x.shape), x.new_empty(states)


def _backward(
    dy: Tensor, x: Tensor, dt_f: Tensor, dt_b: Tensor, A: Tensor, bias: Tensor | None, B_f: Tensor, C_f: Tensor,
    B_b: Tensor, C_b: Tensor, ids: Tensor | None, diagonal: Tensor | None, low: float, high: float, shifted: bool,
    states: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the ten floating point inputs in their order, empty for those that are None."""
    dy, x, B_f, C_f, B_b, C_b = map(_with_rows, (dy, x, B_f, C_f, B_b, C_b))
    A, bias, ids = packed(A, bias, ids)
    steps = Steps(dt_f, dt_b, A, bias, (low, high))
    saved = states if states.numel() else None
    grads = quasiseparable_backward(dy, x, steps, B_f, C_f, B_b, C_b, ids, diagonal, saved, shifted=shifted)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _fake_backward(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in _differentiable(inputs))


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, low, high, shifted, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the states, which have no gradient
    ctx.save_for_backward(*tensors, output[1])
    ctx.options = low, high, shifted


def _differentiate(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    *inputs, states = ctx.saved_tensors
    grads = torch.ops.hydra_ssm.quasiseparable_backward(dy, *inputs, *ctx.options, states)
    given = _differentiable(inputs)
    *first, ddiagonal = (None if t is None else g for g, t in zip(grads, given, strict=True))
    return *first, None, ddiagonal, None, None, None, None


def _differentiable(inputs: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """All but the documents' numbers."""
    return (*inputs[:9], inputs[10])


def _with_rows(t: Tensor) -> Tensor:
    """`t` (B, L, groups, width) as kernels read it: rows of `width`, which start at multiples of it from each other."""
    fits = t.stride(3) == 1 and t.stride(2) % t.shape[3] == 0
    return t if fits else t.contiguous()


register("quasiseparable", f"({INPUTS}, bool keep) -> (Tensor, Tensor)", _forward, _fake_forward, _differentiate, _save)
register(
    "quasiseparable_backward", f"(Tensor dy, {INPUTS}, Tensor states) -> ({', '.join(['Tensor'] * 10)})",
    _backward, _fake_backward, differentiable_once,
)  # fmt: skip
