"""Calls 1, 2, 4, 8, ..., and steps at every interval."""

import pytest

from paraboloid.engine.tape import doubling
from paraboloid.optim.curvature import due


def test_the_calls_that_double():
    assert [n for n in range(1, 40) if doubling(n)] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "interval, want", [(1, [0, 1, 2, 3, 4, 5]), (4, [0, 1, 2, 4, 8, 12]), (10, [0, 1, 2, 4, 8, 10, 20])]
)
def test_the_steps_that_are_due(interval, want):
    assert [t for t in range(50) if due(t, interval)][: len(want)] == want
