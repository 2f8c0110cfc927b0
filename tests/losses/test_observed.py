"""A loss behind a linear measurement: every derivative against the dense matrix, and the posterior that it gives."""

import copy

import pytest
import torch
from torch import nn

import paraboloid as pb

A = pb.tomography.ParallelBeam(4, 3)
DENSE = torch.from_numpy(A.to_scipy().toarray())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 16), nn.Unflatten(1, (4, 4))).double()


def test_derivatives_are_those_of_the_measured_loss():
    loss, f, y, u = (
        pb.losses.Observed(nn.MSELoss(), A),
        draw(2, 4, 4),
        draw(2, *A.gives, seed=1),
        draw(3, 2, 4, 4, seed=2),
    )
    assert loss(f, y) == nn.MSELoss()(A @ f, y)
    r = f.flatten(1) @ DENSE.T - y.flatten(1)
    torch.testing.assert_close(loss.gradient(f, y).flatten(1), 2 * r @ DENSE)
    torch.testing.assert_close(loss.hessian_product(f, y, u).flatten(2), 2 * u.flatten(2) @ DENSE.T @ DENSE)
    torch.testing.assert_close(loss.curvature_product(f, y, u), loss.hessian_product(f, y, u))
    root = torch.stack(list(loss.hessian_root(f, y)))[:, 0].flatten(1)
    torch.testing.assert_close(root.T @ root, 2 * DENSE.T @ DENSE)
    assert loss.root_columns(f) == len(root) == DENSE.shape[0]
    summed = pb.losses.Observed(pb.losses.MSE() + pb.losses.MSE("sum"), A)
    assert [type(term) for term in summed.terms] == [pb.losses.Observed] * 2
    with pytest.raises(ValueError, match="needs targets of the output's shape"):
        loss.check(f, draw(2, 3, 4))


def test_the_ggn_is_that_of_the_network_followed_by_the_measurement():
    model, x, y = network(), draw(2, 3), draw(2, *A.gives, seed=1)
    behind = nn.Sequential(*copy.deepcopy(model), Measured())
    for curvature in (pb.GGN, pb.Hessian, pb.DiagonalGGN):
        one, other = (
            curvature(model, pb.losses.Observed(nn.MSELoss(), A), (x, y)),
            curvature(behind, nn.MSELoss(), (x, y)),
        )
        torch.testing.assert_close(one.to_dense(), other.to_dense())


class Measured(nn.Module):
    def forward(self, f):
        return A @ f


@pytest.mark.parametrize("structure", ["functional", "full"])
def test_a_posterior_of_images_from_their_measurements(structure):
    model, x, y = network(), draw(1, 3), draw(1, *A.gives, seed=1)
    posterior = pb.laplace(model, pb.losses.Observed(nn.MSELoss(), A), (x, y), structure, prior_precision=0.7,
                           noise_variance=0.3)  # fmt: skip
    mean, covariance = posterior.functional(x)
    f = model(x)
    weights = list(model.parameters())
    rows = [torch.autograd.grad(e, weights, retain_graph=True) for e in f.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    AJ = DENSE @ J
    dense = J @ torch.linalg.inv(AJ.T @ AJ / 0.3 + 0.7 * torch.eye(J.shape[1])) @ J.T
    torch.testing.assert_close(covariance[0], dense)
    behind = pb.laplace(nn.Sequential(*copy.deepcopy(model), Measured()), nn.MSELoss(), (x, y), structure,
                        prior_precision=0.7, noise_variance=0.3)  # fmt: skip
    torch.testing.assert_close(posterior.log_evidence(), behind.log_evidence())
    found = posterior.predict(x)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance.flatten(), dense.diagonal())
