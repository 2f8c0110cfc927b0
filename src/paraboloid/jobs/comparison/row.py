"""One quantity of two reports, and what can be said of its difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paraboloid.report.numbers import UNDEFINED, number, with_error

Value = float | int | None


@dataclass(frozen=True)
class Row:
    """A quantity in A and in B with their standard errors (None: not known), and which is the better: "lower",
    "higher", or None where neither is."""

    section: str
    quantity: str
    values: Sequence[Value]
    errors: Sequence[float | None] = (None, None)
    better: str | None = None
    show: Callable[[Any], str] = number

    @property
    def told(self) -> bool | None:
        """Whether two standard errors of the difference tell it from nothing; None where errors are not known."""
        (a, b), (error_a, error_b) = self.values, self.errors
        if a is None or b is None:
            return None
        if a == b:
            return False
        if error_a is None or error_b is None:
            return None
        return abs(b - a) > 2 * math.hypot(error_a, error_b)

    @property
    def winner(self) -> str | None:
        """ "A" or "B" where one is better and the difference is not within its errors."""
        a, b = self.values
        if self.better is None or a is None or b is None or self.told is False:
            return None
        return "A" if (a < b) == (self.better == "lower") else "B"

    def cells(self) -> list[str]:
        """The quantity, both values with their errors, B over A, and what is told."""
        a, b = self.values
        ratio = number(b / a) if a and b is not None and a * b > 0 else UNDEFINED
        return [self.quantity, *map(self._cell, self.values, self.errors), ratio, self._verdict()]

    def _cell(self, value: Value, error: float | None) -> str:
        if value is None or error is None or self.show is not number:
            return UNDEFINED if value is None else self.show(value)
        return with_error(value, error)

    def _verdict(self) -> str:
        a, b = self.values
        if a is None or b is None:
            return UNDEFINED
        if a == b:
            return "equal"
        if self.told is False:
            return "not told apart"
        return f"{self.winner} is better" if self.winner else "differ"

    def plain(self) -> dict[str, Any]:
        """As plain data, with what is told."""
        return {
            "section": self.section, "quantity": self.quantity, "a": self.values[0], "b": self.values[1],
            "error_a": self.errors[0], "error_b": self.errors[1], "better": self.better, "told": self.told,
            "winner": self.winner,
        }  # fmt: skip


def standard_error(share: float | None, count: int | None) -> float | None:
    """Of a share of so many samples: sqrt(p (1 - p) / n)."""
    return None if share is None or not count else math.sqrt(share * (1 - share) / count)
