"""Several processes that train one model: what they agree on, and how the model is dealt out to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import UserError

Result = TypeVar("Result")
PATIENCE = timedelta(days=1)  # for the one process that prepares the data; one that has died is noticed at once
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
FOREIGN = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


@dataclass(frozen=True)
class Team:
    """The processes of a job. They talk over gloo about what they decide: that waits for no GPU."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Team:
        """Of torchrun or accelerate launch; alone without them. Raises UserError for an engine that is not ours."""
        if not several():
            return cls()
        for name in FOREIGN:
            if os.environ.get(name, "false").lower() == "true":
                raise UserError(f"{name} must not be set: start the processes alone, and choose by --sharding")
        from accelerate import PartialState  # type: ignore[import-untyped]

        if not dist.is_initialized():
            _meet()
        PartialState(cpu=not torch.cuda.is_available())
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @contextmanager
    def talking(self) -> Iterator[None]:
        """All but the first are silent, and what they raise after an agreement ends them with its exit code alone."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # Trainer's, of torch
            if not self.first:
                warnings.simplefilter("ignore")
            try:
                yield
            except Exception as error:
                if self.first or not getattr(error, "agreed", hasattr(error, "exit_code")):
                    raise
                raise SystemExit(getattr(error, "exit_code", 2)) from error

    def leave(self) -> None:
        """Say goodbye, once all have come to the end."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def first_does(self, act: Callable[[], Result]) -> Result:
        """What the first process finds; where it fails, all do. Everything in it is done by one process alone."""
        if self.size == 1:
            return act()
        found: list[Any] = [None, None, None]
        error: Exception | None = None
        if self.first:
            try:
                found[0] = act()
            except Exception as failure:
                error = failure
                found[1:] = [isinstance(failure, UserError), f"{failure}"]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if error is not None:
            raise error
        if found[1] is not None:
            raise _agreed(found[2], found[1])
        return found[0]

    def each_does(self, act: Callable[[], Result]) -> Result:
        """What this process finds; where any fails, all do, with the words of the first that did."""
        if self.size == 1:
            return act()
        result, failure = None, None
        try:
            result = act()
        except Exception as error:
            failure = error
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, failure and (isinstance(failure, UserError), f"{failure}"), group=self.group)
        failed = [(rank, found) for rank, found in enumerate(said) if found is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if failure is not None and self.rank == failed[0][0] and self.first:
            raise failure
        rank, (user, text) = failed[0]
        raise _agreed(f"process {rank}: {text}", user)

    def most(self, number: int) -> int:
        """The greatest of what the processes give."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums of what the processes give, the same in all of them."""
        if self.size == 1:
            return list(numbers)
        value = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(value, group=self.group)
        return value.tolist()


def _meet() -> None:
    """The processes find each other.

    torchrun keeps its store when it starts processes anew, with the addresses of those that died. On one machine the
    number of the attempt tells them apart; each machine counts for itself, so that several need a store an attempt.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    elif rank == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
        warnings.warn(f"--max-restarts needs {OWN_STORE}=1 in the environment of every torchrun", stacklevel=3)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _agreed(text: str, user: bool) -> Exception:
    """An error that another process has found."""
    error: Exception = UserError(text) if user else RuntimeError(text)
    error.agreed = True  # type: ignore[attr-defined]
    return error


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process speaks for its job; known before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def restarted() -> bool:
    """Whether torchrun has started the processes in place of some of which one died. All of them ask together.

    Of several machines, torchrun counts on the one alone where it died.
    """
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return bool(Team.join().most(own)) if several() else own


# ---------------------------------------------------------------------------------------------- a model in parts


def shard(model: nn.Module, layers: Sequence[nn.Module], team: Team, device: torch.device, bf16: bool) -> None:
    """FSDP2, in place: each process holds a part of every parameter, in float32.

    A layer fetches its parameters when it runs. With bf16, the weights of linear maps travel as bfloat16, as which
    autocast would use them anyway; all others (A_log, dt_bias, D, norms, convolutions, embeddings) as float32. So the
    sums that a step makes are those of DDP.
    """
    mesh = init_device_mesh(device.type, (team.size,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        linear: list[nn.Module] = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        if bf16 and linear:
            fully_shard(linear, mesh=mesh, mp_policy=rounded)
        fully_shard(layer, mesh=mesh, mp_policy=exact)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state dict in whole tensors on the CPU, which tied weights share. All processes call it."""
    found = model.state_dict(keep_vars=True)
    whole = {id(value): _whole(value) for value in found.values()}
    return {name: whole[id(value)] for name, value in found.items()}


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict as one process would have it, on the CPU. All processes call it."""
    found = optimizer.state_dict()
    state = {i: {name: _whole(value) for name, value in own.items()} for i, own in found["state"].items()}
    return {**found, "state": state}


def deal_out(found: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Give a sharded model's optimizer the state dict of one process, each process its parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {name: _part(value, parameters[i]) for name, value in own.items()} for i, own in found["state"].items()}
    optimizer.load_state_dict({**found, "state": state})


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """What belongs to each element of a parameter is sharded as that is; a count of steps is not."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    device = parameter.device_mesh.device_type
    return distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements)
