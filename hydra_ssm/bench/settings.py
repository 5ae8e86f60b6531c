"""What is measured, on which device and in which sizes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .costs import COSTS
from .layers import TOLERANCE

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
Say = Callable[[str], None]


class WrongResult(RuntimeError):
    """A layer did not pass its check, so that its speed means nothing."""

    exit_code = 1


@dataclass(frozen=True)
class Settings:
    """What is measured: layers of one width on batches of about `tokens` tokens, cut into each of the lengths.

    encoder: whole encoders of such layers as well.
    """

    device: torch.device
    dtype: torch.dtype
    d_model: int
    tokens: int
    lengths: tuple[int, ...]
    layers: tuple[str, ...]
    encoder: bool

    @classmethod
    def of(
        cls, device: str | None = None, dtype: str | None = None, d_model: int | None = None,
        tokens: int | None = None, lengths: Sequence[int] | None = None, layers: Sequence[str] | None = None,
        encoder: bool = False,
    ) -> Settings:  # fmt: skip
        """Sizes of the paper's base model on a GPU, of half a minute on a CPU, where none are given."""
        place = device_of(device)
        on_cpu = place.type == "cpu"
        usual = (128, 512, 2048) if on_cpu else (128, 512, 2048, 8192, 32768, 131072)
        found = cls(
            place,
            DTYPES[dtype or ("float32" if on_cpu else "bfloat16")],
            (256 if on_cpu else 768) if d_model is None else d_model,
            (2048 if on_cpu else 32768) if tokens is None else tokens,
            usual if lengths is None else tuple(lengths),
            (("hydra", "attention") if on_cpu else tuple(COSTS)) if layers is None else tuple(dict.fromkeys(layers)),
            encoder,
        )
        if not (found.layers and found.lengths):
            raise ValueError("--layers and --lengths must name at least one each")
        for option, number in (("d-model", found.d_model), ("tokens", found.tokens), ("lengths", min(found.lengths))):
            if number < 1:
                raise ValueError(f"--{option} must be at least 1, got {number}")
        return found

    def shapes(self) -> list[tuple[int, int]]:
        """(batch, length): a length beyond `tokens` is one sequence."""
        return [(max(1, self.tokens // length), length) for length in self.lengths]

    def options(self) -> dict[str, Any]:
        """By name, as the command line takes them and JSON keeps them."""
        return asdict(self) | {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}

    def command(self) -> str:
        """The command that measures this again."""
        words = ["hydra-ssm", "bench"]
        for name, value in self.options().items():
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            if value is not False:
                words += ["--" + name.replace("_", "-"), *map(str, values)]
        return shlex.join(words)


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one a GPU, else the CPU."""
    gpus = torch.cuda.device_count()
    possible = ["cpu", "cuda", *(f"cuda:{k}" for k in range(gpus))] if gpus else ["cpu"]
    if name is not None and name not in possible:
        raise ValueError(
            f"--device must be one of {', '.join(possible)}, what torch {torch.__version__} sees, got {name}"
        )
    return torch.device(name or ("cuda" if gpus else "cpu"))
