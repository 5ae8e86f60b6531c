"""What transformers does not know of models with mixers, be they of texts or of pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from .mixer import FLOAT32, MatrixMixer

IN_FLOAT32 = tuple(rf"\.{name}$" for name in FLOAT32)  # as patterns of full names


@torch.no_grad()
def initialize_mixers(model: nn.Module, initialize: Callable[[], None]) -> None:
    """`initialize()`, which skips modules made of others alone, then the mixers' own draw of what they mix with."""
    mixers = [m for m in model.modules() if isinstance(m, MatrixMixer) and not getattr(m, "_is_hf_initialized", False)]
    initialize()
    for mixer in mixers:
        for parameter, value in mixer.drawn():
            init.copy_(parameter, value)  # but what a checkpoint filled
