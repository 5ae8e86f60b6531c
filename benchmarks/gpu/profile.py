"""Run each kernel once on 16 x 2048, twice over: something for a profiler to look at."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from product import Case

from hydra_ssm.ops.triton.feature_grads import FeatureGradsConfig
from hydra_ssm.ops.triton.output import OutputConfig
from hydra_ssm.ops.triton.states import StatesConfig
from hydra_ssm.ops.triton.value_grads import ValueGradsConfig

case = Case(16, 2048)
for _ in range(2):
    case.call("value", 64, ValueGradsConfig(24, 1, 4, 2))()
case.call("value", 64, ValueGradsConfig(24, 1, 4, 2, 168))()
case.call("states", 128, StatesConfig(1, False, 4, 2))()
case.call("output", 128, OutputConfig(24, 128, False, 8, 4))()
case.call("feature", 128, FeatureGradsConfig(128, 8, 3))()
case.call("feature", 128, FeatureGradsConfig(64, 4, 2, 168))()
torch.cuda.synchronize()
