"""The dual form, by the tangent kernel, against conjugate gradients on the weights."""

import pytest
import torch
from posteriors.sampled.test_descent import rows
from posteriors.sampled.test_oracles import classifier
from posteriors.sampled.test_use import normalised
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.sampled.tangent_kernel import TangentKernel

OPTIONS = {"samples": 4, "em_steps": 2, "seed": 2, "tol": 1e-10}


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("per", ["all", "layer"])
@pytest.mark.parametrize("make", [classifier, normalised])
def test_it_is_equal_to_the_primal_form(make, per, formed, monkeypatch):
    model, x, y = make()
    loss, data = nn.CrossEntropyLoss(), [(x[:15], y[:15]), (x[15:], y[15:])]
    primal = pb.sampled_laplace(model, loss, data, solver="cg", per=per, **OPTIONS)
    if not formed:  # as where the rows do not fit into memory: a row at a time, through all graphs
        monkeypatch.setattr(TangentKernel, "B", None)
    dual = pb.sampled_laplace(model, loss, data, solver="dual", per=per, **OPTIONS)
    torch.testing.assert_close(rows(dual), rows(primal), rtol=1e-6, atol=1e-7)
    assert dual.prior_precision == pytest.approx(primal.prior_precision, rel=1e-6)
    assert dual.history[-1].residual < 1e-10


def test_a_regression_and_the_unweighted_curvature():
    _, x, _ = classifier()
    model = nn.Linear(4, 2).double()
    for loss, y in ((nn.MSELoss(), x[:, :2]), (nn.CrossEntropyLoss(), torch.arange(40) % 2)):
        options = {"samples": 3, "em_steps": 0, "noise_variance": 0.3, "curvature": "jacobian", "tol": 1e-10}
        primal, dual = (pb.sampled_laplace(model, loss, (x, y), solver=s, **options) for s in ("cg", "dual"))
        torch.testing.assert_close(rows(dual), rows(primal), rtol=1e-6, atol=1e-8)


def test_what_it_cannot_do():
    model, x, y = classifier()
    with pytest.raises(ValueError, match="solver='dual' needs the graphs of all data in this process"):
        data = [(x[:15], y[:15]), (x[15:], y[15:])]
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), data, 2, em_steps=0, solver="dual", max_memory=1)
    many = torch.randn(3001, 4, dtype=torch.float64), torch.arange(3001) % 3
    with pytest.raises(ValueError, match="solver='dual' with 6002 outputs times data points; expected at most 6000"):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), many, 2, em_steps=0, solver="dual")
