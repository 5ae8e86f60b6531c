"""Norm and learning rate of each model, by one rule for both: what is tried next, and what is taken."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from ..rates import further_rate
from ..records import Record
from .plan import MODELS, TEXTS, Choice, Plan, Run, rate_run


def scores(records: Sequence[Record], model: str, norm: str) -> dict[float, float]:
    """Of the rates that a model has tried with a norm: minus its loss on the first held-out text, or -inf."""
    own = [r for r in records if (r["stage"], r["model"], r["norm"]) == ("rate", model, norm)]
    return {r["rate"]: -r["losses"][TEXTS[0]] if "diverged" not in r else float("-inf") for r in own}


def next_runs(plan: Plan, records: Sequence[Record]) -> list[Run]:
    """What is to be tried after that: the plan's rates, then those beyond them. None once enough is known."""
    found: list[Run] = []
    for model, norm in ((model, norm) for model in MODELS for norm in plan.norms):
        tried = scores(records, model, norm)
        further = further_rate(tried, len(plan.rates), plan.further_rates)
        rates = [rate for rate in plan.rates if rate not in tried] or ([] if further is None else [further])
        found += [rate_run(plan, model, norm, rate) for rate in rates]
    return found


def best(records: Sequence[Record], model: str, norms: Sequence[str]) -> Choice | None:
    """The one of the least loss, with one of these norms; None where it diverged with all that it has tried."""
    found = {Choice(norm, rate): score for norm in norms for rate, score in scores(records, model, norm).items()}
    choice = max(sorted(found), key=found.__getitem__, default=None)
    return choice if choice is not None and found[choice] > float("-inf") else None


def choices(plan: Plan, records: Sequence[Record]) -> dict[str, Choice]:
    """Of each model. Raises UserError where all that it has tried has diverged."""
    found = {}
    for model in MODELS:
        choice = best(records, model, plan.norms)
        if choice is None:
            raise UserError(f"{model} must learn at one of the rates, it diverges at all of them: give lower rates")
        found[model] = choice
    return found


def edges(plan: Plan, records: Sequence[Record]) -> list[str]:
    """A sentence for each model and norm whose best rate has no worse one on both sides, though none is to follow."""
    waiting = {(run.model, run.norm) for run in next_runs(plan, records)}
    found = []
    for model, norm in ((model, norm) for model in MODELS for norm in plan.norms):
        choice, tried = best(records, model, (norm,)), scores(records, model, norm)
        if choice is None or (model, norm) in waiting:
            continue
        name = f"{model} with {norm}-norm"
        if len(plan.rates) == 1:
            found.append(f"{choice.rate:g} is the only rate that {model} tried with {norm}-norm.")
        elif choice.rate in (min(tried), max(tried)):
            end, more = ("lowest", "lower") if choice.rate == min(tried) else ("highest", "higher")
            found.append(
                f"The best rate of {name}, {choice.rate:g}, is the {end} that was tried: a {more} one may be better."
            )
    return found
