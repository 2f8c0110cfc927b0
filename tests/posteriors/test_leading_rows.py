"""Exact curvatures by their longest rows: spectrum and prior within some percent, however the rows come."""

import pytest
import torch
from posteriors.dense import close
from torch import nn

from paraboloid.posteriors import laplace
from paraboloid.posteriors.prior_tuning import tuning
from paraboloid.posteriors.prior_tuning.tuning import by_leading_rows
from paraboloid.posteriors.structures.leading_rows import Leading, LeadingRows
from paraboloid.posteriors.structures.rows import Rows, Woodbury

F64 = torch.float64


def rows(n=900, D=700, decay=2.0):
    """Of a network that is sure of most samples: long ones are few."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(n, D, generator=g, dtype=F64) * torch.logspace(0, -1, D, dtype=F64)
    return A * torch.logspace(0, -decay, n, dtype=F64).unsqueeze(1)


@pytest.mark.parametrize("pieces", [900, 250, 7])
def test_the_longest_are_kept_and_the_rest_is_weighed(pieces):
    A = rows()
    A = A[torch.randperm(900, generator=torch.Generator().manual_seed(1))]
    found = LeadingRows.of({"w": torch.zeros(700, dtype=F64)}, A.split(pieces), 300)
    squares = A.square().sum(1)
    close(found.A.square().sum(1).sort().values, squares.sort().values[-300:])
    nodes, counts = found.spectrum
    assert (nodes >= 0).all() and len(found.others) == 64
    close((nodes * counts).sum(), squares.sum())  # the trace
    assert found.missing == pytest.approx((squares.sort().values[:-300].sum() / squares.sum()).item())


def test_all_rows_are_known_exactly():
    A = rows(50)
    found = LeadingRows.of({"w": torch.zeros(700, dtype=F64)}, A.split(20), 64)
    close(found.A.T @ found.A, A.T @ A)
    nodes, counts = found.spectrum
    close(nodes, torch.linalg.eigvalsh(A @ A.T))
    assert torch.equal(counts, torch.ones_like(nodes)) and found.left == pytest.approx(0.0, abs=1e-9)


def test_the_effective_dimension_is_known_within_some_percent():
    A = rows()
    parameters = {"w": torch.zeros(700, dtype=F64)}
    leading = LeadingRows.of(parameters, A.split(200), 300)
    kept = Rows(parameters, leading.A)
    for value in (1.0, 10.0, 300.0):
        prior = {"w": torch.tensor(value, dtype=F64)}
        exact = Woodbury(Rows(parameters, A), prior, 0.7).effective_dimension([["w"]])[0]
        rough = Leading(leading, prior, 0.7).roughly_determined([["w"]])[0]
        alone = Woodbury(kept, prior, 0.7).effective_dimension([["w"]])[0]
        assert abs(rough / exact - 1) < 0.1
        assert abs(rough - exact) < abs(alone - exact)  # the rest counts


def test_rows_that_are_alike_are_not_cut_off():
    """Where a network is sure of nothing the exact form is taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 60), nn.Tanh(), nn.Linear(60, 5))
    x, y = torch.randn(160, 12), torch.randint(5, (160,))
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "functional")
    assert by_leading_rows(posterior, (x, y), "all") is not posterior
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MISSING", 0.01)
        assert by_leading_rows(posterior, (x, y), "all") is posterior
    assert by_leading_rows(posterior, (x, y), "layer") is posterior


@pytest.mark.parametrize("structure", ["full", "functional"])
def test_the_prior_is_tuned_to_some_percent(structure):
    """As the exact updates tune it, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 60), nn.Tanh(), nn.Linear(60, 5))
    x = torch.randn(160, 12)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] * x[:, 2] > 0.3).long() + (x[:, 3] > 1).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    quick = laplace(model, nn.CrossEntropyLoss(), (x, y), structure)
    assert quick.curvature.shape[0] > 1000
    batches = laplace(model, nn.CrossEntropyLoss(), list(zip(x.split(50), y.split(50), strict=True)), structure)
    found = quick.tune_prior(match=None).prior_precision
    assert batches.tune_prior(match=None).prior_precision == pytest.approx(found, rel=0.02)
    model.double()
    exact = laplace(model, nn.CrossEntropyLoss(), (x.double(), y), "functional").tune_prior(match=None)
    assert found == pytest.approx(exact.prior_precision, rel=0.15)
    assert type(quick.curvature) is not LeadingRows  # it is tuned with them, and left as it was
