"""Gradient noise against its definition: every mini-batch that can be drawn, one gradient at a time."""

from itertools import combinations

import pytest
import torch
from torch import nn

from paraboloid.jobs.inspection import subject as subjects
from paraboloid.jobs.inspection.noise import gradient_noise
from paraboloid.jobs.inspection.subject import subject
from paraboloid.problems import Problem

LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)),
}


def problem(loss):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return Problem(model, loss, (x, y), (x, y), name="tiny")


def sample_gradients(problem):
    """[N, D] of the unreduced loss, by a loop."""
    unreduced = nn.CrossEntropyLoss(weight=problem.loss_fn.weight, reduction="none")
    parameters = list(problem.model.parameters())
    x, y = problem.train.tensors
    losses = [unreduced(problem.model(x[n : n + 1]), y[n : n + 1]).sum() for n in range(len(y))]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses])


@pytest.mark.parametrize("chunk", [100, 3])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_noise_is_the_variance_over_all_mini_batches(loss, chunk, monkeypatch):
    monkeypatch.setattr(subjects, "CHUNK", chunk)
    p = problem(loss)
    g = sample_gradients(p)
    batches = torch.stack([g[list(chosen)].mean(0) for chosen in combinations(range(7), 3)])
    variance, mean = batches.var(0, correction=0), g.mean(0)

    found = gradient_noise(subject(p, 100, 0), 3, lambda: None)["total"]
    assert found["average_variance"] == pytest.approx(variance.mean().item(), rel=1e-10)
    normalized = (variance / batches.square().mean(0)).mean().item()
    assert found["normalized_variance"] == pytest.approx(normalized, rel=1e-10)
    single = g.var(0, correction=1).sum()
    signal = mean.square().sum() - single / 7
    assert found["signal"] == pytest.approx(signal.item() / g.shape[1], rel=1e-10)
    assert (signal > 0) == (p.loss_fn.weight is not None)  # both cases are here
    scale = (single / signal).item() if signal > 0 else None
    assert found["noise_scale"] == (scale and pytest.approx(scale, rel=1e-10))
    assert found["noise_to_signal"] == (scale and pytest.approx(scale / 3, rel=1e-10))


def test_layers_add_up_to_the_total():
    s = subject(problem(LOSSES["mean"]), 100, 0)
    found = gradient_noise(s, 2, lambda: None)
    sizes = {layer.name: layer.size for layer in s.layers}
    assert [row["name"] for row in found["layers"]] == ["0", "2"]
    for key in ("average_variance", "normalized_variance", "signal"):
        mean = sum(row[key] * sizes[row["name"]] for row in found["layers"]) / sum(sizes.values())
        assert found["total"][key] == pytest.approx(mean, rel=1e-12)


def test_the_whole_data_has_no_noise():
    found = gradient_noise(subject(problem(LOSSES["mean"]), 100, 0), 64, lambda: None)["total"]
    assert found["average_variance"] == 0
    assert found["normalized_variance"] == 0


def test_without_any_gradient_the_ratios_are_undefined():
    p = problem(LOSSES["mean"])
    with torch.no_grad():
        p.model[2].weight.zero_()
    p.model[2].bias.requires_grad_(False)
    p.model[2].weight.requires_grad_(False)
    found = gradient_noise(subject(p, 100, 0), 3, lambda: None)["total"]
    assert found["noise_to_signal"] is None
    assert found["noise_scale"] is None
    assert found["normalized_variance"] == 0
