"""Under the g-prior no unit counts: of features, of hidden units, of what the data never sees."""

import copy

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.sampled.tangent_system import feature_scales

F64 = torch.float64


def rescaled(model, inputs, hidden):
    """The same function of `inputs` times the data, with its hidden units in other units."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(hidden[:, None]).div_(inputs)
        other[0].bias.mul_(hidden)
        other[2].weight.div_(hidden)
    return other


def problem(outputs):
    """An input that is zero in all data, and two hidden units that are."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=g, dtype=F64)
    x[:, 3] = 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, outputs)).double()
    with torch.no_grad():
        model[0].bias[2], model[0].bias[5] = -6, -8
    new = 20 * torch.randn(40, 5, generator=g, dtype=F64)
    assert (model[:2](x)[:, [2, 5]] == 0).all() and (model[:2](new)[:, [2, 5]] > 0).any()
    return model, x, new


@pytest.mark.filterwarnings("ignore:the relative")  # few epochs
@pytest.mark.parametrize("per", ["all", "layer"])
@pytest.mark.parametrize("solver", ["dual", "block", "cg", "sgd"])
@pytest.mark.parametrize("kind", ["classification", "regression", "noise too"])
def test_no_unit_counts(kind, solver, per):
    """Fourteen orders of magnitude apart, seen or not: precisions and variances far from the data are the same."""
    model, x, new = problem(3 if kind == "classification" else 2)
    loss = nn.CrossEntropyLoss() if kind == "classification" else nn.MSELoss()
    y = torch.arange(50) % 3 if kind == "classification" else x[:, :2].sin()
    c, d = torch.tensor([1e-7, 1, 1e3, 1e5, 1e7], dtype=F64), torch.logspace(-3, 3, 8, dtype=F64)
    options = {"samples": 4, "em_steps": 2, "solver": solver, "per": per, "match": None, "epochs": 4, "seed": 3}
    options["noise_variance"] = None if kind == "noise too" else 1.0
    one, two = (pb.sampled_laplace(m, loss, (z, y), **options) for m, z in ((model, x), (rescaled(model, c, d), x * c)))
    a, b = one.functional(new, diagonal=True)[1], two.functional(new * c, diagonal=True)[1]
    torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
    assert two.effective_dimension == pytest.approx(one.effective_dimension, rel=1e-5)
    assert two.noise_variance == pytest.approx(one.noise_variance, rel=1e-5)
    assert two.history[-1].precision == pytest.approx(one.history[-1].precision, rel=1e-5)


@pytest.mark.parametrize("solver", ["dual", "cg"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_units_apart_by_powers_of_two_round_alike_in_single(kind, solver):
    """What other units change in float32 is the rounding of the features, and nothing that is made of them."""
    model, x, new = problem(3 if kind == "classification" else 2)
    model, x, new = model.float(), x.float(), new.float()
    loss = nn.CrossEntropyLoss() if kind == "classification" else nn.MSELoss()
    y = torch.arange(50) % 3 if kind == "classification" else x[:, :2].sin()
    c, d = 2.0 ** torch.tensor([-9, 0, 3, 5, 11]), 2.0 ** torch.arange(-4, 4)
    one, two = (
        pb.sampled_laplace(m, loss, (z, y), 4, em_steps=2, solver=solver, noise_variance=0.01, seed=3)
        for m, z in ((model, x), (rescaled(model, c, d), x * c))
    )
    assert torch.equal(one.functional(new)[1], two.functional(new * c)[1])
    assert one.history == two.history


def test_scales_of_what_the_data_does_not_see():
    d = torch.tensor([[4.0, 0.0], [16.0, 1e-30]], dtype=F64)
    w = torch.tensor([[1.0, 3.0], [0.5, 0.0]], dtype=F64)
    seen = torch.tensor([4.0, 16.0], dtype=F64).rsqrt()
    found = feature_scales(torch.cat([d.flatten(), torch.zeros(2, dtype=F64)]), [w, torch.ones(2, dtype=F64)])
    squares = (4 * 1 + 16 * 0.25 + 0) / 3  # the mean square of the weights that are seen, in their units
    expected = torch.tensor([seen[0], 3 / squares**0.5, seen[1], 1e30**0.5, 1, 1], dtype=F64)
    torch.testing.assert_close(found, expected)
    d[1, 1] = 0  # a weight of zero that is never seen
    torch.testing.assert_close(feature_scales(d.flatten(), [w])[3].item(), 10**-0.5)
