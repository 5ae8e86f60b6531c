"""Which tile sizes, warps and stages a problem gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from triton.runtime import driver

from .feature_grads import FeatureGradsConfig
from .output import OutputConfig
from .sizes import cdiv
from .states import StatesConfig
from .value_grads import ValueGradsConfig

# Bytes of shared memory a program: H100 and beyond; A100; less than other GPUs of NVIDIA's.
PLENTY, AMPLE, SCARCE = 200_000, 160_000, 96_000
NARROW = 512  # numbers of a token: a program reads so many faster than three more kernels start
STRETCH = 32  # chunks that a program walks through, where programs for all of them would be few
FEW_HEADS = 32  # fewer of them leave so much of a device idle that finding first what each stretch adds is faster
HELD = 16384  # tokens whose adjoint states are in memory at once: the kernels that read them then fill an H100
MOST_PARTS = 2  # of a longer batch: three would save 4 % of its memory more, and take 1 % more time
FEW = 32  # chunks of 64 or 128 tokens: a program that went through all heads of one would leave most of a device idle


@dataclass(frozen=True)
class Plan:
    """Chunk length and the configuration of each kernel."""

    chunk: int = 128
    pair: bool = False  # where one chunk is all there is, the backward pass takes it in two tiles
    split: int = 1  # parts that heads which share B and C are dealt to, where chunks are too few to fill a device
    held: int = 1 << 62  # chunks whose adjoint states are in memory at once
    project: bool = False  # the diagonal where the decays are found, not before
    precision: str = "ieee"  # of float32 products, exact; ignored for 16-bit types
    states: StatesConfig = field(default_factory=StatesConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    value_grads: ValueGradsConfig = field(default_factory=ValueGradsConfig)
    feature_grads: FeatureGradsConfig = field(default_factory=FeatureGradsConfig)


@cache
def _properties(index: int) -> dict[str, int]:
    return driver.active.utils.get_device_properties(index)


@cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _of(device: torch.device, name: str, otherwise: int) -> int:
    if device.type != "cuda" or not _has_gpu():
        return otherwise
    return _properties(torch.cuda.current_device() if device.index is None else device.index)[name]


def room(device: torch.device) -> int:
    """Bytes of shared memory that a program on this device may have."""
    return _of(device, "max_shared_mem", AMPLE)


def stretch_of(heads: int, parts: bool) -> int:
    """Chunks of a stretch where so many heads walk at once; 0: one walk through all, which leaves a row in one part."""
    return STRETCH if heads < FEW_HEADS or parts else 0


def plan(x: Tensor, B: Tensor, backward: bool = False) -> Plan:
    """The plan for x (B, L, H, P) and B (B, L, G, N), as measured on an H100 (benchmarks/gpu/notes.md).

    The backward pass, and a forward pass whose states it takes over, go with shorter chunks, for its registers; but
    not where one chunk of 128 spares all states. Devices with less shared memory get what fits there.
    """
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    heads, bytes_ = H // G, room(x.device)
    few = batch * cdiv(L, 64 if backward and L > 128 else 128) <= FEW
    split = heads & -heads if few and G == 1 else 1  # the power of two in it: one program more to compile, not many
    single, wide = x.dtype == torch.float32, max(N, P) > 64
    stages: tuple[int, int, int]  # of the states, the value gradients and the feature gradients
    deep = 0
    if bytes_ < SCARCE or (single and wide and bytes_ < AMPLE):
        chunk, output, stages = 32, OutputConfig(heads // split, 32, False, 4, 1), (1, 1, 1)
    elif single or wide:
        chunk, output = 32, OutputConfig(heads // split, 32, False, 4, 2)
        # More does not fit beside such tiles.
        stages = (3, 2, 1) if single else (3, 2, 2) if bytes_ >= AMPLE else (3, 1, 1)
    elif L <= 128 or (not backward and bytes_ >= AMPLE):
        chunk, output = 128, OutputConfig(heads // split, 128, False, 8, 4)
        stages, deep = (2 if L <= 512 else 3, 2, 3), 5 if bytes_ >= PLENTY else 0
    else:
        chunk, output = 64, OutputConfig(heads // split, 64, True, 4, 3)
        stages, deep = (4 if L <= 1024 else 3, 2, 3), 7 if bytes_ >= PLENTY else 0
    held = cdiv(max(HELD, cdiv(batch * L, MOST_PARTS)), chunk)
    return Plan(
        chunk=chunk,
        pair=chunk == 128 and L <= 128,
        split=split,
        held=held,
        project=few and H * P <= NARROW,
        states=StatesConfig(
            stretch=stretch_of(batch * H, backward and batch == 1 and cdiv(L, chunk) > held),
            stages=stages[0],
            deep=deep,
            processors=_of(x.device, "multiprocessor_count", 1),
        ),
        output=output,
        value_grads=ValueGradsConfig(stages=stages[1]),
        feature_grads=FeatureGradsConfig(stages=stages[2]),
    )
