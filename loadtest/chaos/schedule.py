"""Which faults strike in which order: drawn once from a seed."""

import random
from collections.abc import Sequence
from typing import TypeVar

Kind = TypeVar("Kind")


def draw(kinds: Sequence[Kind], count: int, seed: int) -> list[Kind]:
    """So many of the kinds, each as often as any other (or once more), in an order of the seed's.

    Nothing strikes twice before everything has struck once.
    """
    rng = random.Random(seed)
    drawn: list[Kind] = []
    while len(drawn) < count:
        drawn += rng.sample(list(kinds), len(kinds))
    return drawn[:count]
