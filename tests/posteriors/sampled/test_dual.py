"""The dual form, by the tangent kernel, against conjugate gradients on the weights."""

import pytest
import torch
from posteriors.sampled.test_descent import rows
from posteriors.sampled.test_oracles import classifier
from posteriors.sampled.test_use import normalised
from torch import nn

import paraboloid as pb
from paraboloid.posteriors.sampled.tangent_blocks import TangentBlocks
from paraboloid.posteriors.sampled.tangent_kernel import TangentKernel

OPTIONS = {"samples": 4, "em_steps": 2, "seed": 2, "tol": 1e-10}


@pytest.mark.parametrize("formed", [True, False])
@pytest.mark.parametrize("per", ["all", "layer"])
@pytest.mark.parametrize("make", [classifier, normalised])
def test_it_is_equal_to_the_primal_form(make, per, formed, monkeypatch):
    model, x, y = make()
    loss, data = nn.CrossEntropyLoss(), [(x[:15], y[:15]), (x[15:], y[15:])]
    primal = pb.sampled_laplace(model, loss, data, solver="cg", per=per, **OPTIONS)
    if not formed:  # as where neither rows nor their outer products fit: a row at a time, through all graphs
        monkeypatch.setattr(TangentKernel, "outputs", None)
        monkeypatch.setattr(TangentKernel, "B", None)
    dual = pb.sampled_laplace(model, loss, data, solver="dual", per=per, **OPTIONS)
    torch.testing.assert_close(rows(dual), rows(primal), rtol=1e-6, atol=1e-7)
    assert dual.prior_precision == pytest.approx(primal.prior_precision, rel=1e-6)
    assert dual.history[-1].residual < 1e-10


def test_rows_are_equal_to_it_too(monkeypatch):
    """Where an operation's outer products need the graph of their pass."""
    model, x, y = classifier()
    found = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), solver="dual", **OPTIONS)
    monkeypatch.setattr(TangentKernel, "outputs", None)
    by_rows = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), solver="dual", **OPTIONS)
    torch.testing.assert_close(rows(by_rows), rows(found), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("per", ["all", "parameter"])
@pytest.mark.parametrize("make", [classifier, normalised])
def test_block_solves_are_equal_to_the_primal_form(make, per, monkeypatch):
    """With blocks of a tenth of the rows; from the samples before, between EM steps."""
    model, x, y = make()
    loss, data = nn.CrossEntropyLoss(), [(x[:9], y[:9]), (x[9:], y[9:])]
    options = {**OPTIONS, "tol": 1e-8, "match": None, "prior_precision": 3.0}
    primal = pb.sampled_laplace(model, loss, data, solver="cg", per=per, **options)
    monkeypatch.setattr("paraboloid.posteriors.sampled.tangent_blocks.BLOCK", 12)
    found = pb.sampled_laplace(model, loss, data, solver="block", per=per, **options)
    torch.testing.assert_close(rows(found), rows(primal), rtol=1e-4, atol=1e-5)
    assert found.prior_precision == pytest.approx(primal.prior_precision, rel=1e-5)
    assert found.residual <= 1e-8


def test_the_rows_of_blocks():
    """A vector that moves in a few rows is followed, whatever was asked for before."""
    g = torch.Generator().manual_seed(0)
    B, precision = torch.randn(9, 5, generator=g), torch.rand(5, generator=g, dtype=torch.float64) + 0.1
    A, v = TangentBlocks(B, precision), torch.randn(9, 2, generator=g, dtype=torch.float64)
    dense, some = torch.eye(9, dtype=torch.float64) + B.double() / precision @ B.double().T, torch.tensor([7, 0, 3])
    torch.testing.assert_close(A @ v, dense @ v)
    torch.testing.assert_close(A.block(some, torch.arange(4)), dense[some, :4])
    torch.testing.assert_close(A.block(some), dense[some])
    for rows_moved in ([2], [2, 8], []):
        v[rows_moved] += 1.5
        torch.testing.assert_close(A.rows(some, v), dense[some] @ v)
    torch.testing.assert_close(A.rows(some, v[:, :1]), dense[some] @ v[:, :1])


def test_a_regression_and_the_unweighted_curvature():
    _, x, _ = classifier()
    model = nn.Linear(4, 2).double()
    for loss, y in ((nn.MSELoss(), x[:, :2]), (nn.CrossEntropyLoss(), torch.arange(40) % 2)):
        options = {"samples": 3, "em_steps": 0, "noise_variance": 0.3, "curvature": "jacobian", "tol": 1e-10}
        primal, dual, block = (
            pb.sampled_laplace(model, loss, (x, y), solver=s, **options) for s in ("cg", "dual", "block")
        )
        torch.testing.assert_close(rows(dual), rows(primal), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(rows(block), rows(primal), rtol=1e-6, atol=1e-7)


def test_what_it_cannot_do(monkeypatch):
    model, x, y = classifier()
    with pytest.raises(ValueError, match="solver='dual' needs the graphs of all data in this process"):
        data = [(x[:15], y[:15]), (x[15:], y[15:])]
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), data, 2, em_steps=0, solver="dual", max_memory=1)
    many = torch.randn(3001, 4, dtype=torch.float64), torch.arange(3001) % 3
    with pytest.raises(ValueError, match="solver='dual' with 6002 outputs times data points; expected at most 6000"):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), many, 2, em_steps=0, solver="dual")
    with monkeypatch.context() as patched:
        patched.setattr(TangentKernel, "B", None)
        with pytest.raises(
            ValueError, match=r"solver='block' keeps the tangent kernel's 80 rows of 51 numbers, \S+ GiB"
        ):
            pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, em_steps=0, solver="block")
    for room in ("tangent_blocks", "shortfall"):
        monkeypatch.setattr(f"paraboloid.posteriors.sampled.{room}.PASSES", 2)
    monkeypatch.setattr("paraboloid.posteriors.sampled.tangent_blocks.BLOCK", 5)
    with pytest.warns(RuntimeWarning, match="2 passes of block solves did not do. Take a larger prior_precision"):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, em_steps=0, solver="block", prior_precision=1e-3)
