"""The processes of a launcher that train together: what each knows of the others, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

WAIT = timedelta(hours=2)  # for the process that reads through the data; the default of NCCL is ten minutes
Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """The number of this process, how many there are, and the device of this one. All of them call each method."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """For each other."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        if self.world == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def merged(self, own: dict[str, Value]) -> dict[str, Value]:
        """What all of them have."""
        if self.world == 1:
            return own
        everybody: list[dict[str, Value]] = [{} for _ in range(self.world)]
        dist.all_gather_object(everybody, own)
        return {name: value for one in everybody for name, value in one.items()}


@contextmanager
def processes() -> Iterator[Processes]:
    """Those that torchrun has started, connected; otherwise this one."""
    world, rank, local = (int(os.environ.get(name, usual)) for name, usual in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # fmt: skip
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Processes(rank, world, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield Processes(rank, world, device)
    finally:
        dist.destroy_process_group()
