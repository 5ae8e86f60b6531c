"""What a training step must compute, and what share of the device's best rate that is: model FLOP utilisation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..bench.costs import product
from ..matrices import Attention, Quasiseparable
from ..mixer import MatrixMixer
from ..text import HydraForMaskedLM

TRAINING = 3  # a step's gradient costs twice what its forward pass does
# FLOP a second of dense bfloat16 products, as the makers state them; by a part of the name, the first that fits.
PEAKS = {
    "B200": 2250e12, "GB200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "GH200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "A40": 150e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250": 383e12,
}  # fmt: skip


def peak(device: str, bf16: bool) -> float | None:
    """FLOP a second of a device with this name; None where that is not known, or another precision is used."""
    if not bf16:
        return None
    return next((rate for name, rate in PEAKS.items() if name in device), None)


@dataclass(frozen=True)
class StepCost:
    """FLOP of a training step: of each token, of each pair of tokens in a document, of each token to predict.

    Counted are products of matrices, the convolutions and the mixers' own products, each once forward and twice
    backward; what is computed again to save memory is not, nor are lookups, norms and activations.
    """

    token: float
    pair: float
    predicted: float

    def __call__(self, tokens: float, pairs: float, predicted: float) -> float:
        return self.token * tokens + self.pair * pairs + self.predicted * predicted


def step_cost(model: HydraForMaskedLM) -> StepCost | None:
    """From the shapes of a model's weights; None where a mixer's class has a product whose cost is not known here."""
    token, pair = _linear(model.model), 0.0
    for mixer in (m for m in model.model.modules() if isinstance(m, MatrixMixer)):
        if issubclass(mixer.matrix_class, Attention) and mixer.data_dependent:
            s = mixer.settings
            pair += TRAINING * 2 * s.nheads * (s.d_state + s.headdim)
        elif issubclass(mixer.matrix_class, Quasiseparable) and mixer.data_dependent:
            token += sum(cost.products for cost in product(mixer, 2))
            token += TRAINING * 2 * mixer.d_inner * mixer.settings.nheads  # fc_D
        else:
            return None
        if not mixer.bare:
            token += TRAINING * 2 * mixer.conv1d.weight.numel()
    return StepCost(token, pair, _linear(model.head) + TRAINING * 2 * model.decoder.weight.numel())


def _linear(module: nn.Module) -> float:
    return TRAINING * 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
