"""The paper's comparison of matrix classes: `hydra-ssm ablate` trains them all, alike in all else."""

from ..errors import Interrupted
from .command import ablate
from .models import GROUPS, all_rows
from .plan import SIZES, Plan

__all__ = ["GROUPS", "SIZES", "Interrupted", "Plan", "ablate", "all_rows"]
