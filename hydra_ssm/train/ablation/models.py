"""The models of an ablation: one for each class and form of the registry, of one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ...matrices import MATRICES
from ...mixer import MatrixMixer
from ...text import PRESETS, HydraConfig, HydraForMaskedLM
from ..errors import UserError
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
    below, above = _neighbours(plan, row, target / plan.layers)
    low, high = (_parameters(plan, row, number) for number in (below, above))
    wider = round((target - plan.layers * low) / (high - low))
    return [above] * wider + [below] * (plan.layers - wider)


def _neighbours(plan: Plan, row: str, target: float) -> tuple[int, int]:
    """The most heads whose parameters are within the target, and the next number that the class can have."""
    possible: list[int] = []
    for number in range(1, 16 * plan.heads):
        try:
            parameters = _parameters(plan, row, number)
        except ValueError:  # a class may ask for an even number
            continue
        possible.append(number)
        if parameters > target and len(possible) > 1:
            return possible[-2], possible[-1]
    raise UserError(f"{row} cannot be given the parameters of {REFERENCE} in this size")


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
    inner = number * plan.headdim
    expand = inner / plan.d_model
    if int(expand * plan.d_model) < inner:  # rounded down
        expand = math.nextafter(expand, math.inf)
    return {"matrix": matrix, "data_dependent": computed, "expand": expand}


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
