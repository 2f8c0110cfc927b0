"""Curvatures of one batch less their predicted bias: against the formula in plain view, and against all data."""

import pytest
import torch
from operators.oracle import classes, make_inputs, make_model
from torch import nn

from paraboloid.operators import GGN
from paraboloid.quadratics.local_model import quadratic
from paraboloid.quadratics.shrinkage import shrunk_curvature

CE = nn.CrossEntropyLoss()


def test_the_formula_in_plain_view():
    """With all 57 directions there is no rest, and kappa comes from the samples one by one."""
    model, batch = make_model("mlp"), (make_inputs("mlp", 9, 0), classes(9, 1))
    q = quadratic(model, CE, batch, weight_decay=0.1)
    rows = q.eigen_directions(57)
    found = shrunk_curvature(q, rows[:57])
    samples = [GGN(model, CE, tuple(t[n : n + 1] for t in batch)).to_dense() for n in range(9)]
    for i in range(4):
        forms = torch.stack([rows[i] @ C @ rows[i] for C in samples])
        l = forms.mean()
        others = [sum(d @ C @ d for C in samples) / 9 for j, d in enumerate(rows) if j != i]
        spread = sum(o / (l - o) for o in others if o.abs() <= 3 * (l - o).abs())
        kappa = forms.square().mean() / 3 / l**2
        expected = l / (1 + kappa * max(spread, 0) / 9) ** 2 + 0.1
        torch.testing.assert_close(found[i], expected, rtol=1e-8, atol=0)


def test_it_is_nearer_to_all_data_than_the_batch_itself():
    """Linear regression on inputs with three large directions among sixty."""
    d, N, m = 60, 8000, 120
    scales = torch.ones(d, dtype=torch.float64)
    scales[:3] = torch.tensor([12.0, 7.0, 4.0]).sqrt()
    x = torch.randn(N, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scales
    model = nn.Linear(d, 1, bias=False).double()
    full = quadratic(model, nn.MSELoss(), (x, torch.zeros(N, 1).double()))
    own, shrunk, truth = [], [], []
    for part in x.split(m)[:30]:
        q = quadratic(model, nn.MSELoss(), (part, torch.zeros(m, 1).double()))
        rows = q.eigen_directions(3)
        for values, found in (
            (own, q.along(rows)[1]),
            (shrunk, shrunk_curvature(q, rows)),
            (truth, full.along(rows)[1]),
        ):
            values.append(found)
    own, shrunk, truth = (torch.stack(v) for v in (own, shrunk, truth))
    assert (shrunk.mean(0) / truth.mean(0) - 1).abs().max() < 0.12  # the rest is no small trace for the third
    assert (own.mean(0) / truth.mean(0) - 1)[2] > 0.2  # the third is overstated most
    assert (shrunk - truth).square().mean() < 0.8 * (own - truth).square().mean()


def test_bad_questions():
    model, batch = make_model("mlp"), (make_inputs("mlp", 9, 0), classes(9, 1))
    hessian = quadratic(model, CE, batch, "hessian", weight_decay=0.1)
    with pytest.raises(ValueError, match="expected a GGN or a Fisher, which are known sample by sample"):
        shrunk_curvature(hessian, hessian.eigen_directions(2))
    q = quadratic(model, CE, batch)
    with pytest.raises(ValueError, match="samples is 0; expected an integer of at least 1"):
        shrunk_curvature(q, q.eigen_directions(2), samples=0)
