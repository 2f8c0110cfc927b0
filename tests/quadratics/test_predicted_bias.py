"""The predicted bias: its limits, its exact identities, and how near it comes on digits."""

import math

import pytest
import torch

from paraboloid import problems
from paraboloid.quadratics.bias_prediction import predicted_bias
from paraboloid.quadratics.local_model import quadratic
from paraboloid.quadratics.measure_bias import bias


def test_a_white_spectrum_gives_marchenko_and_pastur():
    d, m = 60, 120
    found = predicted_bias(torch.ones(d), m, 6000, 1, draws=4)
    limit = (1 + math.sqrt(d / m)) ** 2
    assert 0.85 * limit < found["same"].item() < limit
    assert found["other"].item() == pytest.approx(1 - m / (6000 - m) * (found["same"].item() - 1), rel=1e-12)


def test_a_spike_over_white_noise_is_deformed_as_known():
    """alpha over d white directions: same/full tends to (1 + d/m / (alpha - 1))^2 (Baik and Silverstein 2006; Ledoit
    and Peche 2011)."""
    d, m, alpha = 100, 200, 4.0
    spectrum = torch.cat([torch.tensor([alpha]), torch.ones(d)])
    found = predicted_bias(spectrum, m, 4000, 1, draws=16)
    assert found["same"].item() == pytest.approx((1 + d / m / (alpha - 1)) ** 2, abs=0.08)  # 1.36


def test_half_of_the_data_balances_the_other_half():
    """At m = N/2 the full data is the mean of both halves."""
    found = predicted_bias(torch.rand(20, generator=torch.Generator().manual_seed(0)), 50, 100, 4, draws=3)
    torch.testing.assert_close((found["same"] + found["other"]) / 2, torch.ones(4, dtype=torch.float64))


def test_weight_decay_dilutes_and_unequal_samples_and_small_batches_add():
    spectrum = torch.linspace(1, 0, 30) ** 3
    plain = predicted_bias(spectrum, 20, 1000, 2)["same"]
    assert (predicted_bias(spectrum, 20, 1000, 2, weight_decay=1.0)["same"] < plain).all()
    assert predicted_bias(spectrum, 80, 1000, 2)["same"][0] < plain[0]
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 6
    assert predicted_bias(spectrum, 20, 1000, 2, weights=weights)["same"][0] > 1.1 * plain[0]
    assert torch.equal(predicted_bias(spectrum, 20, 1000, 2)["same"], plain)


def test_digits_are_predicted_from_the_spectrum_alone():
    problem = problems.load("digits-tanh")
    problems.train(problem, evaluations=1)
    full = quadratic(problem.model, problem.loss_fn, problem.train[:])
    spectrum = full.curvature.eigsh(100, tol=1e-2)[0]
    for m in (64, 256):
        found = bias(problem.model, problem.loss_fn, problem.train, m, k=2)
        expected = found.predicted(spectrum)["same"]
        assert (expected - found.ratio("same")).abs().max() < 0.25 * (found.ratio("same")[0] - 1) + 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 51}, r"batch_size is 51; expected an integer in 1\.\.50"),
        ({"draws": 0}, "draws is 0; expected an integer of at least 1"),
        ({"k": 9}, r"k is 9; expected an integer in 1\.\.3"),
        ({"weights": torch.zeros(100)}, r"the weights have shape \(100,\) and sum 0; expected \[100\] numbers"),
        ({"spectrum": torch.tensor([1.0, -1.0])}, r"the spectrum's extremes are \[1.0\] and \[-1.0\]; expected"),
    ],
)
def test_bad_arguments(change, message):
    options = {"spectrum": torch.tensor([3.0, 2.0, 1.0]), "batch_size": 20, "samples": 100, "k": 2} | change
    with pytest.raises(ValueError, match=message):
        predicted_bias(**options)
