"""Quasiseparable mixer: Hydra's. Two shifted scans and a free diagonal."""

from __future__ import annotations

from .semiseparable import Triangles


class Quasiseparable(Triangles):
    """M = strict lower and strict upper semiseparable triangles and a free diagonal. O(L).

    i > j:  dt^f_j (C^f_{i-1} . B^f_j) exp(sum of a^f over j < k < i)
    i < j:  dt^b_j (C^b_{i+1} . B^b_j) exp(sum of a^b over i < k < j)
    i = j:  D_h + <W_D[h], x_i>
    """

    strict = True
    free_diagonal = True


class SharedQuasiseparable(Quasiseparable):
    """Quasiseparable with one B and one C for both directions, as in the paper's comparison of classes. O(L)."""

    shared = True
