"""What holds for every test: no network, one seed, no surprises from the number of cores or a missing GPU."""

import atexit
import gc
import os
import shutil
import tempfile

# Read at import by the libraries below, and inherited by the processes that tests start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the folder of the process that started it
    caches = tempfile.mkdtemp(prefix="hydra-ssm-tests-")  # and not the user's
    atexit.register(shutil.rmtree, caches, ignore_errors=True)  # first to be registered, so after all that writes there
    os.environ |= {"HF_DATASETS_CACHE": f"{caches}/datasets"}
    os.environ |= {f"WANDB_{kind}_DIR": f"{caches}/wandb" for kind in ("CACHE", "CONFIG", "DATA")}

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton decides when it is imported; importing torch has not done that.
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True, scope="module")
def what_is_imported_is_no_garbage() -> None:
    """To look for garbage among millions of objects that stay would be a tenth of the time of all tests, and more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
