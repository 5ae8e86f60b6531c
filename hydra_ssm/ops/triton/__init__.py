"""Triton kernels: imported only where they are used."""

from .decay import Steps
from .library import quasiseparable
from .product import Into, quasiseparable_backward, quasiseparable_forward

__all__ = ["Into", "Steps", "quasiseparable", "quasiseparable_backward", "quasiseparable_forward"]
