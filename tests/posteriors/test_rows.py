"""The curvature by its rows: compressed where they are many, with what was solved last remembered."""

import pytest
import torch
from posteriors.dense import close, curvature, jacobian
from posteriors.test_against_dense import problem
from torch import nn

from paraboloid.posteriors import laplace
from paraboloid.posteriors.structures.rows import Woodbury, compressed


def test_rows_beyond_the_number_of_weights_are_compressed():
    model, x, loss_fn, y = problem("mlp", n=40)
    H = curvature(model, loss_fn, x, y)
    for batch in (5, 40):  # compressed on the way, and at the end
        posterior = laplace(model, loss_fn, list(zip(x.split(batch), y.split(batch), strict=True)), "functional")
        assert posterior.curvature.A.shape == H.shape
        close(posterior.curvature.A.T @ posterior.curvature.A, H)
    first = laplace(model, loss_fn, (x[:20], y[:20]), "functional").update((x[20:], y[20:]))
    assert len(first.curvature.A) == len(H)
    close(first.curvature.A.T @ first.curvature.A, H)


def test_few_rows_stay_as_they_are():
    A = torch.randn(3, 5, dtype=torch.float64)
    assert compressed(A) is A


@pytest.mark.parametrize("structure", ["functional", "lowrank"])
def test_one_precision_for_all_is_the_general_case(structure):
    """The sums over eigenvalues are what the marginal variances and the Cholesky factor give."""
    model, x, loss_fn, y = problem("mlp", n=8)
    posterior = laplace(model, loss_fn, (x, y), structure, rank=7)
    shared = posterior.prior(0.3)
    apart = {k: t.clone() for k, t in shared.items()}  # equal, but not one and the same
    one, other = (Woodbury(posterior.curvature, prior, 1.7) for prior in (shared, apart))
    close(one.log_det(), other.log_det())
    groups = [list(shared)]
    close(one.effective_dimension(groups)[0], other.effective_dimension(groups)[0])


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "functional", "lowrank"])
def test_a_precision_is_remembered(structure):
    """What was solved serves the next call, and gradients are never kept."""
    model, x, loss_fn, y = problem("mlp", n=8)
    posterior = laplace(model, loss_fn, (x, y), structure)
    first = posterior.precision()
    posterior.functional(x)
    posterior.sample(2)
    assert posterior.precision() is first
    noise = torch.ones((), dtype=torch.float64, requires_grad=True)
    prior = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        posterior.log_evidence(prior, noise).backward()
    assert posterior.precision() is first
    posterior.update((x, y))
    assert posterior.precision() is not first
    D = posterior.curvature.shape[0]
    v = torch.randn(D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(posterior.curvature @ v, posterior.curvature.to_dense() @ v)  # the curvature is an operator


def test_what_is_remembered_belongs_to_one_prior_and_strength():
    model, x, loss_fn, y = problem("mlp", n=8)
    posterior = laplace(model, loss_fn, (x, y), "functional", prior_precision=0.5)
    once = posterior.functional(x)[1]
    posterior.prior_precision = 2.0
    close(
        posterior.functional(x)[1], laplace(model, loss_fn, (x, y), "functional", prior_precision=2.0).functional(x)[1]
    )
    posterior.prior_precision, posterior.temperature = 0.5, 0.25
    warm = laplace(model, loss_fn, (x, y), "functional", prior_precision=0.5, temperature=0.25)
    close(posterior.functional(x)[1], warm.functional(x)[1])
    posterior.temperature = 1.0
    assert torch.equal(posterior.functional(x)[1], once)


def test_each_samples_variance_without_it_is_in_the_inverse():
    """As the posterior of all other samples gives it, for batches of several sizes."""
    model, x, _, y = problem("mlp", n=7)
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    posterior = laplace(model, nn.CrossEntropyLoss(), parts, "functional", curvature="jacobian", prior_precision=0.3)
    posterior.temperature = 0.8
    found = posterior.precision().left_by_others()
    _, J = jacobian(model, x)
    H, prior = torch.einsum("nkd,nke->de", J, J), 0.3 * torch.eye(J.shape[2], dtype=J.dtype)
    for n, own in enumerate(J):
        others = (H - own.T @ own) / 0.8 + prior
        close(found[n] * 0.8, (own @ torch.linalg.solve(others, own.T)).diagonal())
    many = laplace(model, nn.CrossEntropyLoss(), (x.repeat(30, 1), y.repeat(30)), "functional")
    assert many.precision().left_by_others() is None  # compressed


def test_a_few_rows_are_solved_for_as_many_are():
    model, x, loss_fn, y = problem("mlp", n=8)
    posterior = laplace(model, loss_fn, (x, y), "functional")
    rows = torch.randn(2, posterior.curvature.shape[0], dtype=torch.float64)
    few = Woodbury(posterior.curvature, posterior.prior(0.3), 1.7).apply(rows)
    dense = 1.7 * posterior.curvature.to_dense() + 0.3 * torch.eye(rows.shape[1], dtype=rows.dtype)
    close(few, torch.linalg.solve(dense, rows.T).T)
