"""Noise measures from one pull, and the exact variance of strata, against explicit gradients."""

import json
import math

import pytest
import torch
from noise.test_clustering import CE, data, gradients, net, simple_variance, stratified_variance
from torch import nn

from paraboloid import noise
from paraboloid.noise.sampler import allocate


def test_every_measure_from_explicit_gradients():
    model, (x, _) = net(), data(30)
    y = x[:, :3].argmax(1)
    g = gradients(model, x, y)
    mean, variance = g.mean(0), g.var(0)
    for batches in ((x, y), [(x[:7], y[:7]), (x[7:29], y[7:29]), (x[29:], y[29:])]):
        found = noise.measures(model, nn.CrossEntropyLoss(reduction="sum"), batches).total
        signal = mean.square().sum() - variance.sum() / 30
        assert found.samples == 30
        assert found.variance == pytest.approx(float(variance.mean()), rel=1e-10)
        assert found.signal == pytest.approx(float(signal) / g.shape[1], rel=1e-10)
        assert found.snr == pytest.approx(float((mean.square() / variance).mean()), rel=1e-9)
        assert found.noise_scale == pytest.approx(float(variance.sum() / signal), rel=1e-10)
        assert found.diversity == pytest.approx(float(g.square().sum() / g.sum(0).square().sum()), rel=1e-10)


def test_layers_are_modules():
    model, xy = net(), data(30)
    found = noise.measures(model, CE, xy)
    assert list(found.layers) == ["0", "2"]
    sizes = {"0": 25, "2": 18}
    mean = sum(found.layers[k].variance * n for k, n in sizes.items()) / 43
    assert found.total.variance == pytest.approx(mean, rel=1e-12)
    json.dumps(found.to_json(), allow_nan=False)


def test_without_signal_ratios_are_undefined():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return self.scale * x

    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    found = noise.measures(Constant(), nn.MSELoss(), (x, torch.ones_like(x))).total
    assert found.noise_scale is None and found.diversity is None and found.snr == 0
    certain = noise.measures(Constant(), nn.MSELoss(), (x.abs(), torch.ones_like(x))).total
    assert certain.variance == 0 and math.isinf(certain.snr) and certain.noise_scale == 0
    with pytest.raises(ValueError, match="the data holds 1 sample; expected at least 2"):
        noise.measures(Constant(), nn.MSELoss(), (x[:1], x[:1]))


def test_strata_have_the_variance_of_the_proposition():
    model, (x, y) = net(), data(40)
    g = gradients(model, x, y)
    assignments = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    assignments[assignments == 3] = 4
    found = noise.strata(model, CE, (x, y), assignments, batch_size=3)
    assert found.variance() == pytest.approx(stratified_variance(g, assignments), rel=1e-10)
    one = noise.strata(model, CE, (x, y), torch.zeros(40, dtype=torch.int64))
    assert one.variance() == pytest.approx(simple_variance(g, 1), rel=1e-10)
    sizes, deviations = found.sizes[[0, 1, 2, 4]], found.deviations[[0, 1, 2, 4]]
    best = allocate("neyman", sizes, 12, deviations)
    draws = torch.ones(5, dtype=torch.int64).index_copy_(0, torch.tensor([0, 1, 2, 4]), best)
    even = torch.full((5,), 3)
    assert found.variance(draws) < found.variance(even) == pytest.approx(found.variance() / 3)
    with pytest.raises(ValueError, match=r"assignments have shape \(3,\); expected \[40\]"):
        noise.strata(model, CE, (x, y), torch.zeros(3))
