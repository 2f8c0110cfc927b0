"""What is made of the arrays [repeats, k] that the bias gives."""

import math

import pytest
import torch

from paraboloid import problems
from paraboloid.jobs.inspection.bias import expected, summary, top_of_all_data
from paraboloid.jobs.inspection.subject import subject
from paraboloid.operators import GGN
from paraboloid.quadratics.bias_prediction import predicted_bias
from paraboloid.quadratics.bias_result import Bias

F64 = torch.float64


def arrays(repeats=400, k=5, seed=0):
    """Curvatures and slopes whose truth is 1 and -1, overstated 1.5 and 2 times on the same batch."""
    g = torch.Generator().manual_seed(seed)

    def around(value):
        return value * (1 + 0.1 * torch.randn(repeats, k, dtype=F64, generator=g))

    curvature = {"same": around(1.5), "other": around(1.0), "full": around(1.0)}
    slope = {"same": around(-2.0), "other": around(-1.0), "full": around(-1.0)}
    return curvature, slope


def bias(curvature, slope):
    return Bias(curvature, slope, 4, 8, "eigen", "ggn", 0.0, 0)


def test_ratios_are_ratios_of_sums():
    curvature, slope = arrays()
    ratios = summary(bias(curvature, slope))["ratios"]
    assert [ratio["directions"] for ratio in ratios] == [1, 5]
    expected = (curvature["same"].sum() / curvature["full"].sum()).item()
    assert ratios[1]["curvature"]["same"]["value"] == pytest.approx(expected, rel=1e-12)
    assert ratios[0]["slope"]["same"]["value"] == pytest.approx(2, abs=0.05)


def test_the_standard_error_is_the_spread_over_draws():
    draws = [summary(bias(*arrays(repeats=20, seed=seed)))["ratios"][0]["curvature"]["same"] for seed in range(300)]
    spread = torch.tensor([draw["value"] for draw in draws]).std().item()
    stated = torch.tensor([draw["standard_error"] for draw in draws]).mean().item()
    assert stated == pytest.approx(spread, rel=0.15)


def test_the_decrease_promised_and_delivered():
    curvature = {which: torch.tensor([[c]], dtype=F64) for which, c in (("same", 4.0), ("other", 2.0), ("full", 2.0))}
    slope = {which: torch.tensor([[s]], dtype=F64) for which, s in (("same", -2.0), ("other", -0.5), ("full", -1.0))}
    found = summary(bias(curvature, slope))
    decrease = found["decrease"]
    assert found["second_batch_gain"] == {"value": pytest.approx(0.1875 - 0.25), "standard_error": None}
    assert decrease["same"]["promised"]["value"] == pytest.approx(0.5)  # step 1/2: 2/2 - 4/8
    assert decrease["same"]["delivered"]["value"] == pytest.approx(0.25)  # 1/2 - 2/8
    assert decrease["other"]["delivered"]["value"] == pytest.approx(0.1875)  # step 1/4: 1/4 - 2/32


def test_one_repeat_has_no_standard_errors():
    curvature, slope = arrays(repeats=1)
    found = summary(bias(curvature, slope))
    assert found["curvature"]["same"]["standard_error"] == [None] * 5
    assert found["ratios"][0]["curvature"]["same"]["standard_error"] is None
    assert math.isfinite(found["ratios"][0]["curvature"]["same"]["value"])


def test_a_flat_direction_has_no_ratio_and_no_step():
    curvature, slope = arrays(repeats=4)
    flat = {which: torch.zeros_like(values) for which, values in curvature.items()}
    found = summary(bias(flat, slope))
    assert found["ratios"][0]["curvature"]["same"] == {"value": None, "standard_error": None}
    assert found["decrease"]["same"]["promised"] == {"value": None, "standard_error": None}


def test_the_spectrum_of_all_data_has_its_top_and_its_trace():
    problem = problems.load("digits-tanh")
    measured = subject(problem, 256, 0)
    spectrum, directions = top_of_all_data(measured, 4, 0)
    dense = GGN(problem.model, problem.loss_fn, measured.batches).to_dense().double()
    values, vectors = torch.linalg.eigh(dense)
    torch.testing.assert_close(spectrum[:4].double(), values.flip(0)[:4], rtol=1e-3, atol=0)
    assert spectrum.sum().item() == pytest.approx(dense.trace().item(), rel=0.1)
    assert spectrum.tolist() == sorted(spectrum.tolist(), reverse=True)
    torch.testing.assert_close(
        (directions.double() @ vectors.flip(1)[:, :4]).square().sum(), torch.tensor(4.0).double()
    )


def test_what_is_expected_of_a_batch():
    spectrum, full = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([3.0, 1.0])
    found, ratios = expected(spectrum, full, 10, 100, 0.1), predicted_bias(spectrum, 10, 100, 2, weight_decay=0.1)
    assert found["same"] == pytest.approx((ratios["same"] @ full.double() / 4).item())
    nothing = {"same": None, "other": None}
    assert expected(spectrum, full, 1, 100, 0.1) == nothing  # two directions of a single sample
    assert expected(torch.zeros(3), full, 10, 100, 0.1) == nothing


def test_the_length_of_the_step():
    curvature, slope = arrays()
    found = summary(bias(curvature, slope))["step"]
    assert found["same"]["mean"][0] == pytest.approx(2 / 1.5, rel=0.05)
    assert found["full"]["mean"][0] == pytest.approx(1, rel=0.05)
