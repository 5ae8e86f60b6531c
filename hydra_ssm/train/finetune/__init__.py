"""A trained encoder on tasks: GLUE by the paper's recipe (`hydra-ssm glue`), and users' own data (`finetune`)."""

from .glue import glue
from .own import finetune

__all__ = ["finetune", "glue"]
