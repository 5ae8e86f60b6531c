"""Models without rounding and chance."""

import pytest
from small_models import KINDS, tiny

from hydra_ssm.text import HydraForMaskedLM


@pytest.fixture(params=KINDS)
def exact(request: pytest.FixtureRequest) -> HydraForMaskedLM:
    """A model of each kind in float64, without dropout."""
    return HydraForMaskedLM(tiny(request.param)).double().eval()
