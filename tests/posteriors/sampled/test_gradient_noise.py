"""The noise in the right-hand side leaves less in the gradients of batches: whatever the loss and the units.

At the solution L^T J w has the covariance of its leverage h and L^T J w - eps has I - h: less where the data determines
less than half of what it has outputs for.
"""

import pytest
import torch
from posteriors.sampled.test_oracles import classifier
from posteriors.sampled.test_oracles_of_other_losses import LOSSES, problem
from torch import nn

from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.sampled.solvers import Descent, batches, sample_targets
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.posteriors.sampled.tangent_system import TangentSystem, feature_scales

F64 = torch.float64


def plain():
    model, x, y = classifier()
    return model, nn.CrossEntropyLoss(), x, y


PROBLEMS = {"categorical": plain, **{name: lambda name=name: problem(name) for name in LOSSES}}


@pytest.mark.parametrize("precision", [0.5, 5.0])
@pytest.mark.parametrize("g_prior", [False, True])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_variance_of_gradients_at_the_solution(kind, g_prior, precision):
    """Of both objectives' gradients over batches; their means are those of the whole system there, zero."""
    model, loss, x, y = PROBLEMS[kind]()
    data = list(zip(x.split(10), y.split(10), strict=True))
    system = TangentSystem(TangentCurvature(model, Likelihood.of(loss).loss, data), 2.0, 0, range(4))
    diagonal = system.diagonal()
    if g_prior:
        system.scale = feature_scales(diagonal, system.parameters)
    Lambda = torch.full((system.size,), precision * (1.0 if g_prior else diagonal.mean().item()), dtype=F64)
    b = system.right_hand_sides(Lambda)
    A = system.product(torch.eye(system.size, dtype=F64)) + Lambda.diag()
    w = torch.linalg.solve(A, b.T).T
    variances = {}
    for noisy in (False, True):
        targets, gradients = sample_targets(system, Descent(noisy=noisy)), []
        right = system.right_hand_sides(Lambda, data=False) if noisy else b
        for start, graph in batches(system, 0):
            for k, parts in system.pulled(graph, targets(graph, start, system.pushed(graph, w))):
                parts, coefficient = system.of_all(graph, parts)
                data_part = system.deviations(torch.cat([t.flatten() for t in parts])) * coefficient
                gradients.append(data_part + Lambda * w[k] - right[k])
        rows = torch.stack(gradients).view(len(data), 4, -1)
        torch.testing.assert_close(rows.mean(0), torch.zeros_like(rows[0]), atol=1e-8, rtol=0)
        variances[noisy] = rows.square().mean().item()
    assert variances[False] < variances[True]
