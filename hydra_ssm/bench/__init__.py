"""How fast the layers are on this machine: what `hydra-ssm bench` prints, each time after its check."""

from .matrices import bench_matrices
from .run import bench, run
from .settings import Settings, WrongResult

__all__ = ["Settings", "WrongResult", "bench", "bench_matrices", "run"]
