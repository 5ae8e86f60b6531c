"""The models of an ablation: one for each class and form of the registry, of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from ...encoder import expand_to
from ...matrices import MATRICES
from ...mixer import MatrixMixer
from ...text import PRESETS, HydraConfig, HydraForMaskedLM
from ..errors import UserError
from ..matching import heads_of_layers
from .plan import Plan

FIXED = "-fixed"
REFERENCE = "quasiseparable"  # whose parameters, at twice the width within, the others are given
TOLERANCE = 0.02  # of the parameters of a model, the embeddings included
GROUPS = {
    "table2": (
        "dense-fixed", "toeplitz-fixed", "toeplitz", "dft-fixed", "vandermonde-fixed", "vandermonde", "cauchy-fixed",
        "cauchy", "low_rank-fixed", "low_rank", "attention-fixed", "attention", "quasiseparable-fixed",
        "quasiseparable", "quasiseparable_shared",
    ),
    "table3": ("semiseparable", "add", "mult", "concat", "quasiseparable"),
    "table10": ("add", "add_diagonal", "add_shift", "quasiseparable"),
}  # fmt: skip


def all_rows() -> list[str]:
    """Every class of the registry: its data-dependent form by the class's name, its fixed form by that and -fixed."""
    computed = [name for name, matrix in MATRICES.items() if matrix.data_dependent]
    return computed + [name + FIXED for name, matrix in MATRICES.items() if matrix.fixed]


def choose(names: Sequence[str]) -> list[str]:
    """The rows of these names, which may be those of the paper's tables; of none, all. Raises UserError."""
    rows = all_rows()
    found = [row for name in names for row in GROUPS.get(name, (name,))]
    if unknown := [name for name in found if name not in rows]:
        raise UserError(f"rows must be of {', '.join([*GROUPS, *rows])}, got {unknown[0]}")
    return list(dict.fromkeys(found)) or rows


def form(row: str) -> tuple[str, bool]:
    """(name of its matrix class, whether it is data dependent)."""
    return row.removesuffix(FIXED), not row.endswith(FIXED)


def state(plan: Plan, row: str) -> int:
    """N of a row: the plan's, or what the released comparison gives a class for heads of 64, in proportion."""
    if not plan.unmatched:
        return plan.d_state
    matrix, computed = form(row)
    released = PRESETS.get(f"{matrix}-12{'' if computed else FIXED}", {}).get("d_state", 64)
    return max(1, released * plan.headdim // 64)


def has_state(plan: Plan, row: str) -> bool:
    """Whether the class of a row has an N at all."""
    one, two = (_parameters(replace(plan, unmatched=False, d_state=n), row, plan.heads) for n in (1, 2))
    return one != two


def heads(plan: Plan, row: str) -> list[int]:
    """Heads of each layer: all parameters that a row has left go into its inner width.

    The layers of a row differ by one step at most, by which the sum comes nearest to that of the reference.
    """
    if plan.unmatched:
        return [plan.heads] * plan.layers
    target = plan.layers * _parameters(plan, REFERENCE, plan.heads)
    try:
        return heads_of_layers(plan.layers, target, partial(_parameters, plan, row), 16 * plan.heads)
    except ValueError:
        raise UserError(f"{row} cannot be given the parameters of {REFERENCE} in this size") from None


@cache
def _parameters(plan: Plan, row: str, number: int) -> int:
    """Of one mixer with so many heads."""
    with torch.device("meta"):
        mixer = MatrixMixer(
            plan.d_model, **_spec(plan, row, number), headdim=plan.headdim, d_state=state(plan, row),
            max_length=plan.length,
        )  # fmt: skip
    return sum(parameter.numel() for parameter in mixer.parameters())


def _spec(plan: Plan, row: str, number: int) -> dict[str, Any]:
    """A mixer of so many heads."""
    matrix, computed = form(row)
    return {"matrix": matrix, "data_dependent": computed, "expand": expand_to(number * plan.headdim, plan.d_model)}


def config(plan: Plan, row: str, vocabulary: int) -> HydraConfig:
    """The model of a row for a tokenizer of so many tokens. Raises UserError where its parameters cannot be matched."""
    found = _config(plan, row, vocabulary)
    if not plan.unmatched:
        own, equal = (parameters(c) for c in (found, _config(plan, REFERENCE, vocabulary)))
        if abs(own - equal) > TOLERANCE * equal:
            raise UserError(
                f"{row} has {own:,} parameters and {REFERENCE} {equal:,}, more than {TOLERANCE:.0%} apart: choose a "
                f"smaller --headdim than {plan.headdim}, by which the width within grows"
            )
    return found


def _config(plan: Plan, row: str, vocabulary: int) -> HydraConfig:
    return HydraConfig(
        vocab_size=-(-vocabulary // 8) * 8, hidden_size=plan.d_model, d_state=state(plan, row), headdim=plan.headdim,
        mixers=[_spec(plan, row, number) for number in heads(plan, row)], max_position_embeddings=plan.length,
    )  # fmt: skip


def parameters(config: HydraConfig) -> int:
    """Of the masked language model, embeddings included."""
    with torch.device("meta"):
        return HydraForMaskedLM(config).num_parameters()
