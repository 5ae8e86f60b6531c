"""A trained encoder on tasks: GLUE by the paper's recipe (`hydra-ssm glue`), and users' own data (`finetune`)."""

from .glue import glue

__all__ = ["glue"]
