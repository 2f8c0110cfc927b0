"""What is made of the arrays [repeats, k] that the bias gives."""

import math

import pytest
import torch

from paraboloid.inspection.bias import summary

F64 = torch.float64


def arrays(repeats=400, k=5, seed=0):
    """Curvatures and slopes whose truth is 1 and -1, overstated 1.5 and 2 times on the same batch."""
    g = torch.Generator().manual_seed(seed)

    def around(value):
        return value * (1 + 0.1 * torch.randn(repeats, k, dtype=F64, generator=g))

    curvature = {"same": around(1.5), "other": around(1.0), "full": around(1.0)}
    slope = {"same": around(-2.0), "other": around(-1.0), "full": around(-1.0)}
    return curvature, slope


def test_ratios_are_ratios_of_sums():
    curvature, slope = arrays()
    ratios = summary(curvature, slope)["ratios"]
    assert [ratio["directions"] for ratio in ratios] == [1, 5]
    expected = (curvature["same"].sum() / curvature["full"].sum()).item()
    assert ratios[1]["curvature"]["same"]["value"] == pytest.approx(expected, rel=1e-12)
    assert ratios[0]["slope"]["same"]["value"] == pytest.approx(2, abs=0.05)


def test_the_standard_error_is_the_spread_over_draws():
    draws = [summary(*arrays(repeats=20, seed=seed))["ratios"][0]["curvature"]["same"] for seed in range(300)]
    spread = torch.tensor([draw["value"] for draw in draws]).std().item()
    stated = torch.tensor([draw["standard_error"] for draw in draws]).mean().item()
    assert stated == pytest.approx(spread, rel=0.15)


def test_the_decrease_promised_and_delivered():
    curvature = {which: torch.tensor([[c]], dtype=F64) for which, c in (("same", 4.0), ("other", 2.0), ("full", 2.0))}
    slope = {which: torch.tensor([[s]], dtype=F64) for which, s in (("same", -2.0), ("other", -0.5), ("full", -1.0))}
    decrease = summary(curvature, slope)["decrease"]
    assert decrease["same"]["promised"]["value"] == pytest.approx(0.5)  # step 1/2: 2/2 - 4/8
    assert decrease["same"]["delivered"]["value"] == pytest.approx(0.25)  # 1/2 - 2/8
    assert decrease["other"]["delivered"]["value"] == pytest.approx(0.1875)  # step 1/4: 1/4 - 2/32


def test_one_repeat_has_no_standard_errors():
    curvature, slope = arrays(repeats=1)
    found = summary(curvature, slope)
    assert found["curvature"]["same"]["standard_error"] == [None] * 5
    assert found["ratios"][0]["curvature"]["same"]["standard_error"] is None
    assert math.isfinite(found["ratios"][0]["curvature"]["same"]["value"])


def test_a_flat_direction_has_no_ratio_and_no_step():
    curvature, slope = arrays(repeats=4)
    flat = {which: torch.zeros_like(values) for which, values in curvature.items()}
    found = summary(flat, slope)
    assert found["ratios"][0]["curvature"]["same"] == {"value": None, "standard_error": None}
    assert found["decrease"]["same"]["promised"] == {"value": None, "standard_error": None}
