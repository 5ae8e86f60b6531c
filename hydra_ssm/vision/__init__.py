"""Image models of matrix mixers. Importing this registers them with timm: timm.create_model("vit_hydra_...").

Where transformers is installed, HydraForImageClassification is here too, and known to its Auto classes.
"""

from importlib.util import find_spec

from .._extras import imports_unannounced, require

with imports_unannounced():
    require("timm", "vision")
    if find_spec("transformers"):
        require("transformers.modeling_utils", "text")

from . import registry
from .conditions import TimeStep
from .dropin import DropIn
from .models import HydraViT
from .orders import ORDERS, places, reading

MODELS = (*registry.HYDRA, *registry.DROP_IN)

__all__ = ["MODELS", "ORDERS", "DropIn", "HydraViT", "TimeStep", "places", "reading"]

if find_spec("transformers"):
    from .huggingface import HydraForImageClassification, HydraViTConfig

    __all__ += ["HydraForImageClassification", "HydraViTConfig"]
