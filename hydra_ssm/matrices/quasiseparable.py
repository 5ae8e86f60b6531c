"""Quasiseparable mixer: Hydra's. Two shifted scans and a free diagonal."""

from __future__ import annotations

from torch import Tensor

from ..ops import fused_block
from .base import Projected
from .semiseparable import Triangles


class Quasiseparable(Triangles):
    """M = strict lower and strict upper semiseparable triangles and a free diagonal. O(L).

    i > j:  dt^f_j (C^f_{i-1} . B^f_j) exp(sum of a^f over j < k < i)
    i < j:  dt^b_j (C^b_{i+1} . B^b_j) exp(sum of a^b over i < k < j)
    i = j:  D_h + <W_D[h], x_i>
    """

    strict = True
    free_diagonal = True

    @classmethod
    def fused(cls, block: Projected) -> Tensor | None:
        """Kernels for all of the block, where they run; not with one B and C for both directions or initial states."""
        settings, own = block.settings, block.parameters
        if cls.shared or settings.learnable_init_states:
            return None
        return fused_block(
            block.projected, block.conv_weight, block.conv_bias, own["dt_bias"], own["A_log"], own["D"],
            own["fc_D.weight"], block.norm_weight,
            (settings.nheads, settings.headdim, settings.ngroups, settings.d_state), settings.dt_limit,
            block.norm_eps, block.documents, impl=settings.impl, recompute=settings.recompute,
            reuse=block.private,
        )  # fmt: skip


class SharedQuasiseparable(Quasiseparable):
    """Quasiseparable with one B and one C for both directions, as in the paper's comparison of classes. O(L)."""

    shared = True
