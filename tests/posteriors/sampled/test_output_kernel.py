"""The covariance of all outputs under the prior, and the optimum of the linearised model by it, against dense ones."""

import pytest
import torch
from posteriors.sampled.test_oracles import classifier
from posteriors.sampled.test_use import normalised
from torch import nn

import paraboloid as pb
from paraboloid.losses import Loss
from paraboloid.posteriors.prior_tuning.linearised import optimum
from paraboloid.posteriors.sampled import dual_optimum as dual
from paraboloid.posteriors.sampled.output_kernel import OutputKernel, contracted, output_kernel
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.posteriors.sampled.tangent_kernel import TangentKernel
from paraboloid.posteriors.sampled.tangent_system import TangentSystem

F64 = torch.float64


def system(model, loss, data, scale=True, max_memory=None):
    found = TangentSystem(TangentCurvature(model, Loss.from_torch(loss), data, max_memory=max_memory), 2.0, 0, range(2))
    if scale:
        found.scale = torch.rand(found.size, generator=torch.Generator().manual_seed(1), dtype=F64).to(found.like) + 0.5
    return found


def in_batches(make):
    model, x, y = make()
    return model, nn.CrossEntropyLoss(), [(x[:15], y[:15]), (x[15:], y[15:])]


def regression(make):
    model, x, _ = make()
    return model, nn.MSELoss(), [(x[:15], model(x[:15]).detach().sin()), (x[15:], model(x[15:]).detach().cos())]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("make", [classifier, normalised])
def test_it_is_that_of_the_jacobian(make, scale):
    of = system(*in_batches(make), scale)
    kernel, g = output_kernel(of, 6000), torch.Generator().manual_seed(2)
    assert kernel is not None
    Q = sum(kernel.sizes)
    J = torch.stack([kernel.pulled(e) for e in torch.eye(Q, dtype=F64)])
    precision = torch.rand(of.size, generator=g, dtype=F64) + 0.1
    for some in (precision, torch.full_like(precision, 3.0), torch.full_like(precision, 5.0)):
        torch.testing.assert_close(kernel.at(some), (J / some) @ J.T)
    w = torch.randn(of.size, generator=g, dtype=F64)
    torch.testing.assert_close(kernel.pushed(w), J @ w)
    roots = [torch.randn(len(graph.f), graph.f.shape[1], 2, generator=g, dtype=F64) for graph in kernel.graphs]
    L = torch.block_diag(*[block for root in roots for block in root])
    K = kernel.at(precision)
    torch.testing.assert_close(contracted(K, roots), L.T @ K @ L)
    rows = TangentKernel(of)
    rows.__dict__["outputs"] = None  # by all of them
    torch.testing.assert_close(TangentKernel(of).kernel(precision), rows.kernel(precision))


def test_one_precision_moves_without_forming_it_again(monkeypatch):
    of = system(*in_batches(classifier))
    kernel = output_kernel(of, 6000)
    first = kernel.at(torch.full((of.size,), 0.3, dtype=F64))
    monkeypatch.setattr(OutputKernel, "_formed", None)
    torch.testing.assert_close(kernel.at(torch.full((of.size,), 0.6, dtype=F64)), first / 2)


def test_where_there_is_none():
    assert output_kernel(system(*in_batches(classifier)), 10) is None  # of more outputs
    model, x, y = classifier()
    of = system(model, nn.CrossEntropyLoss(), [(x, y)])
    of.replay.max_memory = 2 * of.replay.size + 100  # what was recorded would not fit
    assert output_kernel(of, 6000) is None


@pytest.mark.parametrize("tries", [0, 30])
@pytest.mark.parametrize("problem", [in_batches, regression])
@pytest.mark.parametrize("make", [classifier, normalised])
def test_the_optimum_is_that_of_the_weights(make, problem, tries, monkeypatch):
    """From the model and from elsewhere, with factors of its own and with that of another point."""
    monkeypatch.setattr(dual, "TRIES", max(tries, 1))
    of = system(*problem(make))
    kernel, linear = TangentKernel(of), ScaledModel(of)
    g = torch.Generator().manual_seed(3)
    precision = torch.rand(of.size, generator=g, dtype=F64) + 0.01
    expected = optimum(linear, precision, of.strength)
    factor = torch.eye(kernel.size, dtype=F64) if tries else kernel.factor(precision)
    for start in (None, torch.randn(of.size, generator=g, dtype=F64)):
        found = dual.dual_optimum(kernel.outputs, linear, precision, of.strength, start, factor)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_sure_network(dtype):
    """Hessians that vanish where the search begins, a kernel with eigenvalues of 1e5, and a weak prior."""
    model, x, y = classifier()
    with torch.no_grad():
        model[-1].weight.mul_(20)
    of = system(model.to(dtype), nn.CrossEntropyLoss(), [(x.to(dtype), y)])
    kernel, linear, precision = TangentKernel(of), ScaledModel(of), torch.full((of.size,), 0.1, dtype=dtype)
    found = dual.dual_optimum(kernel.outputs, linear, precision, of.strength, None, kernel.factor(precision))

    def objective(delta):
        return of.strength * linear.value(delta) + (precision * (linear.theta + delta).square()).sum() / 2

    expected = objective(optimum(linear, precision, of.strength))
    torch.testing.assert_close(objective(found), expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


def test_a_wide_network_takes_no_rows(monkeypatch):
    """By default, with the g-prior: the rows of 120 outputs and 22,000 weights are never formed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 140), nn.Tanh(), nn.Linear(140, 140), nn.Tanh(), nn.Linear(140, 3))
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    monkeypatch.setattr(TangentKernel, "B", property(lambda self: pytest.fail("rows were formed")))
    posterior = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, em_steps=1, solver="dual", seed=1)
    assert posterior.residual < 1e-3 and posterior.predict(x).sum(1).allclose(torch.ones(40))
