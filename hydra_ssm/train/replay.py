"""A step of training as a CUDA graph, replayed without Python; where there can be none, the step itself."""

from __future__ import annotations

import torch

from ..bench.clock import Run, captured
from .errors import in_a_line
from .workers import Say


def replayed(step: Run, device: torch.device, say: Say) -> tuple[Run, bool]:
    """(what does the step, whether it is a graph). What cannot be captured is told, and why.

    The step's tensors must be the same ones at each call, and its gradients set to None at its beginning: a replay
    writes them anew. Raises OutOfMemoryError.
    """
    try:
        return captured(step, device), True
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # an operation that waits for the device, or reads from the host
        say(f"no CUDA graph, training is slower: {in_a_line(error)}")
        return step, False
