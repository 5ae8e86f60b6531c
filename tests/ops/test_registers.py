"""What the assembler makes of the kernels, seen without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


FITS = """
import sys
import torch
from triton.runtime import driver
sys.path.insert(0, "benchmarks/gpu")
import registers
from hydra_ssm.ops.triton import plan
from hydra_ssm.ops.triton.product import Steps, quasiseparable_forward

driver.set_active(registers.NoDevice(89))
compiled = registers.compile_only()
plan.room = lambda device: 101376
for N, P, L in ((64, 64, 5000), (128, 128, 300)):
    x, B = torch.zeros(1, L, 8, P, dtype=torch.bfloat16), torch.zeros(1, L, 1, N, dtype=torch.bfloat16)
    dt = torch.zeros(1, L, 8, dtype=torch.bfloat16)
    steps = Steps(dt, dt, torch.ones(8), torch.zeros(2, 8), (0.0, 9.0))
    quasiseparable_forward(x, steps, B, B, B, B, None, dt)
print(max(kernel.metadata.shared for _, kernel in compiled))
"""


@pytest.mark.slow
def test_inference_fits_into_the_shared_memory_of_a_gpu_that_has_little(tmp_path) -> None:
    """Of 99 KiB a program, as GPUs for desktops and laptops have; what an H100 takes is more."""
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FITS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 101376


@pytest.mark.slow
def test_no_kernel_reads_a_register_that_nothing_wrote(tmp_path) -> None:
    """ptxas 12.8 reads such ones for narrow operands where no loop over heads is left; addresses are then random."""
    nvidia = pytest.importorskip("triton.backends.nvidia")
    if not (Path(nvidia.__path__[0]) / "bin" / "cuobjdump").exists():
        pytest.skip("this triton comes without cuobjdump")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/gpu/registers.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_value_grads_kernel" in done.stdout
    assert "_output_kernel" in done.stdout
