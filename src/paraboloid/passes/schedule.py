"""When something costly is done again: often at first, while things still change, and rarely later."""

from __future__ import annotations


def doubling(count: int) -> bool:
    """Whether call number `count`, from 1, is one of 1, 2, 4, 8, ..."""
    return count & (count - 1) == 0


def due(t: int, interval: int) -> bool:
    """Whether step t, from 0, is one of every `interval`; before the first interval is over also 1, 2, 4, 8, ..."""
    return t % interval == 0 or (t < interval and doubling(t))
