"""Two questions that a comparison of matrix classes leaves: what its block learns without any, and in more steps.

    python benchmarks/more_ablation.py runs/books/data runs/more --limit 500

`identity` is a row whose matrix mixes nothing: the convolution of the block is all that it has, at equal parameters.
`longer` trains a few classes three times as long, one seed. The data is that of an ablation of the medium size; what is
stopped goes on by the same command. Writes results/ablation_identity.json and results/ablation_longer.json.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hydra_ssm import MATRICES
from hydra_ssm.matrices import Inputs, StructuredMatrix
from hydra_ssm.train.ablation import ablate

RESULTS = Path(__file__).parents[1] / "results"
LONGER: dict[str, Any] = {"rows": ("quasiseparable", "attention", "low_rank"), "seeds": (0,), "steps": 3000}


@dataclass(frozen=True)
class Identity(StructuredMatrix):
    """M = I: no token hears of another."""

    fixed: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    skip: ClassVar[bool] = False

    like: Tensor  # (B, L, H, P)

    @classmethod
    def build(cls, inputs: Inputs) -> Self:
        return cls(inputs.documents, inputs.x)

    def entries(self) -> Tensor:
        batch, length, heads, _ = self.like.shape
        return torch.eye(length, dtype=self.like.dtype, device=self.like.device).expand(batch, heads, -1, -1)

    def multiply(self, x: Tensor) -> Tensor:
        return x


MATRICES["identity"] = Identity  # here, not in main: the processes that train import this file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the folder data/ of an ablation")
    parser.add_argument("out", type=Path, help="a folder for both")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--steps", type=int, default=1000, help="of identity; of longer three times as many")
    parser.add_argument("--size", default="medium")
    asked = parser.parse_args()
    deadline = time.time() + asked.limit
    questions: dict[str, dict[str, Any]] = {
        "identity": {"rows": ("identity",), "seeds": (0, 1, 2), "steps": asked.steps},
        "longer": {**LONGER, "steps": 3 * asked.steps},
    }
    for name, settings in questions.items():
        left = max(0.0, deadline - time.time())
        report = ablate(asked.data, asked.out / name, size=asked.size, jobs=3, limit=left, **settings)
        if not report["runs"]:
            break
        report["command"] = " ".join(["python benchmarks/more_ablation.py", *sys.argv[1:]])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"ablation_{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
