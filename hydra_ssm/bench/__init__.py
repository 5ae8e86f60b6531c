"""How fast the layers are on this machine: what `hydra-ssm bench` prints, each time after its check."""

from .run import Settings, WrongResult, run

__all__ = ["Settings", "WrongResult", "run"]
