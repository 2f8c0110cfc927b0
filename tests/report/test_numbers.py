import math

import pytest

from paraboloid.report.numbers import count, fixed, number, percent, seconds, short, with_error


@pytest.mark.parametrize(
    "value, text",
    [
        (1.7439, "1.74"),
        (0.012345, "0.0123"),
        (99.96, "100"),
        (9.996, "10.0"),
        (1840.2, "1,840"),
        (99999.0, "1.00×10⁵"),
        (3.21e-5, "3.21×10⁻⁵"),
        (-0.5, "−0.500"),
        (0.0, "0"),
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, error, text",
    [
        (1.7412, 0.0931, "1.74 ± 0.09"),
        (0.9333, 0.062, "0.933 ± 0.062"),
        (12.4, 3.12, "12.4 ± 3.1"),
        (0.0, 0.02, "0.000 ± 0.020"),
        (2.5e-6, 3.1e-7, "(2.50 ± 0.31)×10⁻⁶"),
        (-1.03, 0.71, "−1.03 ± 0.71"),
        (1.74, None, "1.74"),
        (1.74, 0.0, "1.74"),
        (1.74, 1e-9, "1.74"),
        (None, 0.1, "–"),
    ],
)
def test_with_error(value, error, text):
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    "value, text",
    [(0.7249, "72%"), (1.0, "100%"), (0.0, "0%"), (0.0004, "<0.1%"), (0.0149, "1.5%"), (None, "–")],
)
def test_percent(value, text):
    assert percent(value) == text


def test_fixed_keeps_the_decimals_of_a_column():
    assert [fixed(1.5, 0.25), fixed(-0.031, 0.1, 3), fixed(2.0, None), fixed(None, 1.0)] == [
        "1.50 ± 0.25",
        "−0.031 ± 0.100",
        "2.00",
        "–",
    ]


def test_percent_with_three_digits():
    assert percent(0.9861, 3) == "98.6%"


def test_short_and_count_and_seconds():
    assert [short(v) for v in (60.0, 0.001, 10 / 23, 0.0, 3e-6, None)] == [
        "60",
        "0.001",
        "0.4348",
        "0",
        "3.0×10⁻⁶",
        "–",
    ]
    assert [count(3818), count(None)] == ["3,818", "–"]
    assert [seconds(4.21), seconds(125.2), seconds(None)] == ["4.2 s", "2 min 05 s", "–"]
