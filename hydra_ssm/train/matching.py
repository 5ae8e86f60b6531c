"""Equal parameters: how many heads the layers of a matrix class get, so that models of several classes compare."""

from __future__ import annotations

from collections.abc import Callable


def heads_of_layers(layers: int, target: float, parameters: Callable[[int], int], most: int) -> list[int]:
    """Heads of each layer, one step apart at most, with which all layers come nearest to so many parameters together.

    Args:
        parameters: of a layer with so many heads, rising; ValueError where its class cannot have as many.
        most: heads of a layer.

    Raises:
        ValueError: a layer has too few parameters with the most heads, too.
    """
    below, above = _neighbours(target / layers, parameters, most)
    low, high = parameters(below), parameters(above)
    wider = min(layers, max(0, round((target - layers * low) / (high - low))))
    return [above] * wider + [below] * (layers - wider)


def _neighbours(target: float, parameters: Callable[[int], int], most: int) -> tuple[int, int]:
    """The most heads whose parameters are within the target, and the next number that the class can have."""
    possible: list[int] = []
    for number in range(1, most + 1):
        try:
            found = parameters(number)
        except ValueError:  # a class may ask for an even number
            continue
        possible.append(number)
        if found > target and len(possible) > 1:
            return possible[-2], possible[-1]
    raise ValueError(f"a layer of {most} heads must have more than {target:,.0f} parameters")
