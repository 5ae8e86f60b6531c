"""Image models of matrix mixers. Importing this registers them with timm: timm.create_model("vit_hydra_...")."""

# ruff: noqa: E402 - the extra is named before its packages are imported

from .._extras import require

require("timm", "vision")

from . import registry
from .dropin import DropIn
from .models import HydraViT
from .orders import ORDERS, places, reading

MODELS = (*registry.HYDRA, *registry.DROP_IN)

__all__ = ["MODELS", "ORDERS", "DropIn", "HydraViT", "places", "reading"]
