"""The commands of hydra-ssm and their options: as tyro reads them. Each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable

from .comparing import compare, compare_prepare
from .images import image_compare, image_eval, image_predict, image_train
from .measuring import ablate, bench
from .models import convert, embed, export, fill_mask, inspect
from .training import data_prepare, pretrain
from .tuning import finetune, glue

COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": pretrain,
    "fill-mask": fill_mask,
    "embed": embed,
    "export": export,
    "inspect": inspect,
    "convert": convert,
    "bench": bench,
    "ablate": ablate,
    "compare": compare,
    "compare prepare": compare_prepare,
    "data prepare": data_prepare,
    "glue": glue,
    "finetune": finetune,
    "image train": image_train,
    "image eval": image_eval,
    "image predict": image_predict,
    "image compare": image_compare,
}
