"""A model of each kind, as small as can be."""

from typing import Any

import torch
from torch import Tensor

from hydra_ssm.text import HydraConfig

VOCABULARY = 40

KINDS: dict[str, dict[str, Any]] = {
    "hydra": {"num_hidden_layers": 2},
    "bert": {
        "mixers": "attention",
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "position_embeddings": True,
        "max_position_embeddings": 12,
        "hidden_dropout": 0.1,
    },
    "hybrid": {
        "mixers": ["hydra", "attention", {"matrix": "low_rank", "data_dependent": False, "d_state": 4}, "toeplitz"],
        "max_position_embeddings": 12,
        "norm": "pre",
    },
}


def tiny(kind: str = "hydra", **changes: Any) -> HydraConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "headdim": 16, "d_state": 8}
    return HydraConfig(**(sizes | KINDS[kind] | changes))


def words(*shape: int) -> Tensor:
    return torch.randint(5, VOCABULARY, shape)
