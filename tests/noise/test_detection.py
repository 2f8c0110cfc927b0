"""Prototypes and outliers, mislabelled samples, duplicates."""

import pytest
import torch
from noise.test_clustering import CE, data, gradients, net
from torch import nn

from paraboloid import noise
from paraboloid.noise.detection import sample_losses


def test_prototypes_and_outliers_are_the_nearest_and_the_farthest():
    clusters = noise.GradientClustering(net(), CE, 3).fit(data(40))
    found = noise.members(clusters, 4)
    assert sum(m.size for m in found) == 40
    for m in found:
        mine = torch.nonzero(clusters.assignments == m.cluster).flatten()
        order = mine[clusters.distances[mine].argsort()].tolist()
        assert m.prototypes == order[:4] and m.outliers == order[::-1][: len(m.outliers)]
        assert not set(m.prototypes) & set(m.outliers)
        assert m.spread == pytest.approx(float(clusters.distances[mine].mean()))


def test_scores():
    model, (x, y) = net(), data(30)
    clusters = noise.GradientClustering(model, CE, 3).fit((x, y))
    losses = nn.functional.cross_entropy(model(x).detach(), y, reduction="none")
    torch.testing.assert_close(noise.suspicion(clusters, (x, y), "loss"), losses)
    torch.testing.assert_close(sample_losses(model, CE, (x, y), batch_size=7), losses)
    torch.testing.assert_close(noise.suspicion(clusters, score="norm"), gradients(model, x, y).square().sum(1))
    assert torch.equal(noise.suspicion(clusters, score="distance"), clusters.distances)
    assert noise.precision_at(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]), 2) == 0.5


def test_duplicates_are_found_and_nothing_else():
    model, (x, y) = net(), data(30)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.arange(30), torch.tensor([3] * 20 + [7] * 9 + [11])])[order]
    found = noise.duplicates(model, CE, (x[rows], y[rows]), batch_size=13)
    expected = [torch.nonzero(rows == i).flatten().tolist() for i in (3, 7, 11)]
    assert found == expected


def test_without_duplicates():
    assert noise.duplicates(net(), CE, data(50)) == []


def test_errors():
    clusters = noise.GradientClustering(net(), CE, 3).fit(data(10))
    with pytest.raises(ValueError, match="score is 'margin'; expected one of"):
        noise.suspicion(clusters, score="margin")
    with pytest.raises(ValueError, match="score='loss' needs the dataset"):
        noise.suspicion(clusters, score="loss")
    with pytest.raises(ValueError, match="tolerance is 2; expected a number between 0 and 1"):
        noise.duplicates(net(), CE, data(10), tolerance=2)
    with pytest.raises(ValueError, match="count is 0"):
        noise.members(clusters, 0)
