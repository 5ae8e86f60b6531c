"""Where the Triton kernels run, and who decides it: the one place that knows."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_WIDTHS = (16, 32, 64, 128)  # of heads and states
CONV_WIDTHS = (3, 5, 7, 9)
WIDEST_NORM = 16384
# Facts of the process, asked for once, as tracing could not ask.
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def exporting() -> bool:
    """Whether torch.export traces. torch.compiler.is_exporting() says so within torch.compile, too, in torch 2.11."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def transforming() -> bool:
    """Whether torch.func transforms: it takes any operation, but no gradient in a closed form."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def has_values() -> bool:
    """Whether what tensors hold may decide: not while torch compiles, nor where one example stands for many."""
    return not (torch.compiler.is_compiling() or transforming())


def takes_triton(impl: str | None, x: Tensor, misfit: Callable[[], str | None]) -> bool:
    """Whether kernels compute what begins with x; misfit says what they need and do not get.

    None chooses them on CUDA where nothing misfits, but not for a program that is to run elsewhere and not under
    torch.func. Who names them gets them or the reason: ValueError for a misfit, ImportError where there is no Triton.
    """
    if impl is None:
        return x.is_cuda and HAS_TRITON and not (exporting() or transforming()) and misfit() is None
    if impl != "triton":
        return False
    if not HAS_TRITON:
        raise ImportError('impl="triton" needs triton, which is not installed: pip install triton', name="triton")
    if reason := misfit():
        raise ValueError(f'impl="triton" {reason}')
    return True


def misplaced(x: Tensor, *others: Tensor | None) -> str | None:
    """What all kernels need of the dtype of x and the device of all and do not get."""
    if not (x.is_cuda or INTERPRETED):
        return f"needs tensors on a CUDA device, or TRITON_INTERPRET=1 when Python starts, got x on {x.device}"
    if x.dtype not in KERNEL_DTYPES:
        return f"needs x in float32, float16 or bfloat16, got {x.dtype}"
    for t in others:
        if t is not None and t.device != x.device:
            return f"needs all tensors on one device, got {x.device} and {t.device}"
    return None


def conv_misfit(weight: Tensor) -> str | None:
    """What the convolution's kernels need of its weight (C, 1, width) and do not get."""
    if weight.shape[-1] not in CONV_WIDTHS:
        return f"needs a convolution over {_either(CONV_WIDTHS)} tokens, got {weight.shape[-1]}"
    return None


def norm_misfit(width: int) -> str | None:
    """What the norm's kernels need of the width of a row and do not get."""
    return None if width <= WIDEST_NORM else f"needs a norm of rows of at most {WIDEST_NORM}, got {width}"


def product_misfit(headdim: int, state: int) -> str | None:
    """What the product's kernels need of its sizes and do not get."""
    for name, width in (("headdim", headdim), ("state", state)):
        if width not in KERNEL_WIDTHS:
            return f"needs a {name} of {_either(KERNEL_WIDTHS)}, got {width}"
    return None


def check_layer_impl(impl: str | None) -> None:
    """Raise ValueError unless impl names one of the two forms of the convolution and the norm, or none."""
    if impl not in (None, "triton", "eager"):
        raise ValueError(f"impl must be triton or eager, got {impl!r}")


def _either(choices: tuple[int, ...]) -> str:
    return ", ".join(map(str, choices))
