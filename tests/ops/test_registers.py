"""What the assembler makes of the kernels, seen without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
