"""Hydra beside BERT on one GPU: settings of `hydra_ssm.train.comparison.compare`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hydra_ssm.train.comparison import Plan


def compare_medium(**given: Any) -> dict[str, Any]:
    """38M parameters, six passes over 17 million tokens of books, three seeds; then GLUE's whole tasks, longer rows,
    and the faster model on as many seconds as the slower one takes. About 40 minutes on one H100.

    Expect: docs/results.md has what came out, of these settings.
    """
    return asdict(Plan(**given))


def compare_tiny(**given: Any) -> dict[str, Any]:
    """Every part of it in seconds on a CPU, to see that it runs: what it learns means nothing."""
    tiny: dict[str, Any] = {
        "hydra": "hydra-tiny", "bert": "bert-tiny", "length": 16, "batch_tokens": 64, "rates": (3e-3, 1e-3),
        "further_rates": 1, "rate_tokens": 256, "tokens": 64 * 12, "seeds": (0, 1), "lengths": (16, 32),
        "length_tokens": 256, "evaluations": 3, "evaluation_tokens": 256, "tasks": ("RTE",), "task_seeds": (0,),
        "save_after": 0.1,
    }  # fmt: skip
    return asdict(Plan(**tiny | given))
