"""Chains of elementwise operations as one kernel each, where somebody asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]
_on = False  # of the process: an argument would go through mixer, matrix and autograd's functions, forward and backward


@contextmanager
def fused() -> Iterator[None]:
    """Within it, torch.compile makes one kernel of what cauchy and vandermonde compute for each of their terms.

    On a GPU a product then moves several times less memory. The first one of each shape waits some seconds for the
    compiler. For a training step, the backward pass has to be within it, too.
    """
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def fusible(f: Function) -> Function:
    """A function of tensors that are all of one shape each time, which `fused` compiles."""
    compiled = cache(lambda: torch.compile(f, dynamic=False))

    @wraps(f)
    def run(*given: Any) -> Tensor:
        return compiled()(*given) if _on and not torch.compiler.is_compiling() else f(*given)

    return run
