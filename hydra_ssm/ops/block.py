"""Everything between the projections of the Hydra layer as one operation, where there are kernels for it."""

from __future__ import annotations

from torch import Tensor

from .backend import conv_misfit, misplaced, norm_misfit, product_misfit, takes_triton
from .documents import Documents


def fused_block(
    projected: Tensor, conv: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, fc_D: Tensor,
    norm: Tensor, sizes: tuple[int, int, int, int], limits: tuple[float, float], eps: float,
    documents: Documents | None, *, impl: str | None = None, recompute: bool = False, reuse: bool = False,
) -> Tensor | None:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, z | x | B_f C_f | B_b C_b | dt_f dt_b), or None where that
    is to be made of parts: impl says so, no kernel fits, or weights are elsewhere until their module is called.

        x, B, C = SiLU(conv(...))    y = (quasiseparable matrix) x    normed = RMSNorm(y) * SiLU(z)

    Args:
        conv, conv_bias, dt_bias, A_log, D, fc_D, norm: the layer's parameters, in any floating point dtypes.
        sizes: heads, headdim, groups and state.
        limits: of dt, after its softplus.
        impl: None takes the kernels on CUDA where they fit, "triton" takes them or raises, others never.
        recompute: keep nothing for the backward pass but what came in.
        reuse: nobody else reads `projected`: its gradient may take its place.

    Raises:
        ValueError: impl is "triton", which cannot take these sizes, this dtype or this device.
        ImportError: impl is "triton", which is not installed.
    """
    weights = (conv, conv_bias, dt_bias, A_log, D, fc_D, norm)
    if not all(t is None or t.device == projected.device for t in weights):
        return None
    if not takes_triton(impl, projected, lambda: _misfit(projected, conv, sizes)):
        return None
    from .triton.block import Sizes, Weights, block

    ids = None if documents is None else documents.ids
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    return block(projected, Weights(*weights), Sizes(*sizes), limits, eps, ids, recompute=recompute, reuse=reuse)


def _misfit(projected: Tensor, conv: Tensor, sizes: tuple[int, int, int, int]) -> str | None:
    heads, headdim, _, state = sizes
    return misplaced(projected) or product_misfit(headdim, state) or conv_misfit(conv) or norm_misfit(heads * headdim)
