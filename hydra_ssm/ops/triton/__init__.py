"""Triton kernels: imported only where they are used."""

from .product import quasiseparable_backward, quasiseparable_forward

__all__ = ["quasiseparable_backward", "quasiseparable_forward"]
