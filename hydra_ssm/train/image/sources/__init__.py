"""Where pictures come from: class folders, tar shards, data sets of the datasets library, scikit-learn's digits.

Each can be asked for any picture at any time, shards too, which is what an exact resumption needs.
"""

from .digits import Digits
from .opening import in_full, open_held_out, open_parts
from .parts import ENDINGS, HELD_OUT_NAMES, TRAIN_NAMES, Part, Parts, is_divided, is_hidden

__all__ = [
    "ENDINGS", "HELD_OUT_NAMES", "TRAIN_NAMES", "Digits", "Part", "Parts", "in_full", "is_divided", "is_hidden",
    "open_held_out", "open_parts",
]  # fmt: skip
