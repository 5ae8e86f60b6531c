"""A small text with something to learn."""

import random

NOUNS = ["cat", "dog", "tree", "house", "river", "stone", "boat", "king"]
VERBS = ["sees", "likes", "finds", "leaves"]


def sentences(count: int, seed: int = 0) -> str:
    """One a line, always of the same form."""
    draw = random.Random(seed)
    return "".join(f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} a {draw.choice(NOUNS)}.\n" for _ in range(count))
