"""Text encoders as transformers models. Importing this registers them with the Auto classes."""

from .._extras import imports_unannounced, require

with imports_unannounced():
    require("transformers", "text")
    require("transformers.modeling_utils", "text")  # and torchao, where that is installed

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .config import PRESETS, HydraConfig, preset
from .heads import (
    HydraForMaskedLM,
    HydraForMultipleChoice,
    HydraForQuestionAnswering,
    HydraForSequenceClassification,
    HydraForTokenClassification,
)
from .models import HydraModel, HydraPreTrainedModel

AutoConfig.register(HydraConfig.model_type, HydraConfig, exist_ok=True)
for _auto, _model in {
    AutoModel: HydraModel,
    AutoModelForMaskedLM: HydraForMaskedLM,
    AutoModelForMultipleChoice: HydraForMultipleChoice,
    AutoModelForQuestionAnswering: HydraForQuestionAnswering,
    AutoModelForSequenceClassification: HydraForSequenceClassification,
    AutoModelForTokenClassification: HydraForTokenClassification,
}.items():
    _auto.register(HydraConfig, _model, exist_ok=True)

__all__ = [
    "PRESETS",
    "HydraConfig",
    "HydraForMaskedLM",
    "HydraForMultipleChoice",
    "HydraForQuestionAnswering",
    "HydraForSequenceClassification",
    "HydraForTokenClassification",
    "HydraModel",
    "HydraPreTrainedModel",
    "preset",
]
