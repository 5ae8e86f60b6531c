"""What the measurements ran on, and the two rates that no layer can exceed there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from .clock import timed


@dataclass(frozen=True)
class Ceilings:
    """The best of several copies (bytes read and written) and large square matrix products in the layers' dtype."""

    copy: float  # bytes a second
    matmul: float  # FLOP a second

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        """Takes up to 2 GB on a GPU, 256 MB on a CPU."""
        on_cpu = device.type == "cpu"
        source = torch.zeros(1 << (27 if on_cpu else 30), dtype=torch.uint8, device=device)
        target, size = torch.empty_like(source), 1024 if on_cpu else 8192
        factor = torch.randn(size, size, device=device).to(dtype)
        seconds = timed({"copy": lambda: target.copy_(source), "matmul": lambda: factor @ factor}, device, min)
        return cls(2 * source.numel() / seconds["copy"], 2 * size**3 / seconds["matmul"])


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(device: torch.device) -> dict[str, str | int]:
    """Device and versions, for the report."""
    found: dict[str, str | int] = {
        "device": device_name(device), "python": platform.python_version(), "torch": torch.__version__
    }  # fmt: skip
    if device.type == "cpu":
        waiting = os.environ.get("OMP_WAIT_POLICY", "default")
        return found | {"threads": torch.get_num_threads(), "OMP_WAIT_POLICY": waiting}
    found["driver"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for package in ("triton", "mamba-ssm", "fla-core", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
