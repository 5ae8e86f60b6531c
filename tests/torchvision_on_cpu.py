"""Let PyPI's torchvision, built for CUDA, be imported beside a CPU build of torch: `make install` runs this.

Its library then fails to load, and its Python code registers fake versions of operators that nobody has declared. Every
process of the development environment declares them before it imports torchvision, if it does.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

OPERATORS = ("nms", "qnms")


class Declares:
    """A finder of modules that finds none, but is asked before torchvision is imported."""

    library: Any = None

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")  # the operators live as long as this object
            for operator in OPERATORS:
                cls.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install() -> None:
    """Have every process of this environment do so, if torchvision is there and cannot be imported."""
    if importlib.util.find_spec("torchvision") is None or _imports():
        return
    site = Path(sysconfig.get_path("purelib"))
    shutil.copy(__file__, site)
    name = Path(__file__).stem
    (site / f"{name}.pth").write_text(f"import {name}; {name}.begin()\n", encoding="utf-8")
    if not _imports():
        sys.exit("torchvision cannot be imported; install the release that fits this torch")


def begin() -> None:
    """Watch for torchvision in this process."""
    sys.meta_path.insert(0, Declares)  # type: ignore[arg-type]


def _imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


if __name__ == "__main__":
    install()
