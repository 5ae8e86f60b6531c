"""Which learning rates are tried: a few, and further ones as long as the best is the highest or the lowest."""

from __future__ import annotations

from collections.abc import Mapping


def further_rate(tried: Mapping[float, float], planned: int, most: int) -> float | None:
    """What is tried next after rates that had these scores, higher ones better; None where enough is known.

    Twice the highest or half the lowest, if that is the best one; of equal ones the lowest counts.

    Args:
        planned: how many are tried whatever comes out; one alone is no choice, nothing is tried beyond it.
        most: further ones in all.
    """
    if not 1 < planned <= len(tried) < planned + most:
        return None
    best = max(sorted(tried), key=tried.__getitem__)
    return {max(tried): 2 * best, min(tried): best / 2}.get(best)
