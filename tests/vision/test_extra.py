"""What hydra_ssm.vision needs, and what it does without."""

import importlib
import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules["transformers"] = None
import hydra_ssm.vision, timm, torch
assert not hasattr(hydra_ssm.vision, "HydraForImageClassification")
print(timm.create_model("vit_hydra_tiny_patch4_32", depth=1)(torch.randn(1, 3, 32, 32)).shape[1])
"""


def test_models_of_timm_need_no_transformers():
    ran = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert ran.stdout == "10\n", ran.stderr


def test_the_extra_is_named_where_timm_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("hydra_ssm.vision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'timm is not installed: pip install "hydra-ssm\[vision\]"'):
        importlib.import_module("hydra_ssm.vision")
