"""Experiments as Python functions: each returns all settings of one, and says what it needs and what to expect.

    python -m recipes                                                  lists them
    python -m recipes hydra_base c4-128/ --out runs/hydra-base         trains one

docs/recipes.md has a command for each.
"""

from collections.abc import Callable
from typing import Any

from hydra_ssm.train.recipe import Recipe

from .comparison import compare_medium, compare_tiny
from .pretraining import (
    bert_base,
    bert_large,
    bert_medium,
    bert_small,
    bert_tiny,
    hydra_base,
    hydra_large,
    hydra_medium,
    hydra_small,
    hydra_tiny,
)

PRETRAINING: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        hydra_base, bert_base, hydra_large, bert_large, hydra_medium, bert_medium, hydra_small, bert_small,
        hydra_tiny, bert_tiny,
    )
}  # fmt: skip
COMPARISONS: dict[str, Callable[..., dict[str, Any]]] = {
    recipe.__name__: recipe for recipe in (compare_medium, compare_tiny)
}
