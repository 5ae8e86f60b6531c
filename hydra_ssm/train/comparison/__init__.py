"""Hydra beside BERT: the same tokens, the same seconds, GLUE, longer rows. `hydra-ssm compare` does it."""

from .command import compare
from .data import write as prepare
from .plan import Plan

__all__ = ["Plan", "compare", "prepare"]
