"""Functions on tensors, no parameters: what the mixers compute."""

from .block import fused_block
from .conv import short_conv
from .documents import Documents, Layout, layout, per_document, rows, zero_padding
from .linear import first_linear, last_linear
from .norm import gated_rms_norm
from .orders import Order, Ordering, make_orders
from .semiseparable import semiseparable
from .triangle import Triangle

__all__ = [
    "Documents",
    "Layout",
    "Order",
    "Ordering",
    "Triangle",
    "first_linear",
    "fused_block",
    "gated_rms_norm",
    "last_linear",
    "layout",
    "make_orders",
    "per_document",
    "rows",
    "semiseparable",
    "short_conv",
    "zero_padding",
]
