"""Everything between the projections of the Hydra layer as one operation, where there are kernels for it."""

from __future__ import annotations

from torch import Tensor

from .documents import Documents
from .semiseparable import HAS_TRITON, INTERPRETED, KERNEL_DTYPES, KERNEL_WIDTHS


def fused_block(
    projected: Tensor, conv: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A_log: Tensor, D: Tensor, fc_D: Tensor,
    norm: Tensor, sizes: tuple[int, int, int, int], limits: tuple[float, float], eps: float,
    documents: Documents | None, *, impl: str | None = None, recompute: bool = False,
) -> Tensor | None:  # fmt: skip
    """normed (B, L, inner) of projected (B, L, z | x | B_f C_f | B_b C_b | dt_f dt_b), or None where no kernel fits.

        x, B, C = SiLU(conv(...))    y = (quasiseparable matrix) x    normed = RMSNorm(y) * SiLU(z)

    Args:
        conv, conv_bias, dt_bias, A_log, D, fc_D, norm: the layer's parameters, in any floating point dtypes.
        sizes: heads, headdim, groups and state.
        limits: of dt, after its softplus.
        impl: None takes the kernels on CUDA, "triton" wherever they run, others never.
        recompute: keep nothing for the backward pass but what came in.
    """
    weights = (conv, conv_bias, dt_bias, A_log, D, fc_D, norm)
    chosen = projected.is_cuda or (impl == "triton" and INTERPRETED)
    here = all(t is None or t.device == projected.device for t in weights)  # weights may be fetched when they are used
    fits = projected.dtype in KERNEL_DTYPES and {sizes[1], sizes[3]} <= set(KERNEL_WIDTHS)
    if impl not in (None, "triton") or not (HAS_TRITON and chosen and here and fits and conv.shape[-1] > 1):
        return None
    from .triton.block import Sizes, Weights, block

    ids = None if documents is None else documents.ids
    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    return block(projected, Weights(*weights), Sizes(*sizes), limits, eps, ids, recompute=recompute)
