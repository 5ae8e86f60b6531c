"""The comparison of image models: ViT, Hydra-ViT and its rivals, alike in all else."""

from .command import compare
from .data import prepare
from .plan import ROWS, Plan

__all__ = ["ROWS", "Plan", "compare", "prepare"]
