"""Measuring and re-clustering while a model is trained."""

import json

import pytest
import torch
from noise.test_clustering import CE, data, net

from paraboloid import noise, problems


def steps(model, xy, count):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(count):
        yield step
        optimizer.zero_grad()
        CE(model(xy[0]), xy[1]).backward()
        optimizer.step()


def test_references_and_clusters_are_renewed_at_their_own_pace():
    model, xy = net(), data(60)
    monitor = noise.Monitor(model, CE, xy, 5, ["sgb", "svrg", "gc"], draws=4, every=2, refresh=4, reference="full")
    for step in steps(model, xy, 7):
        found = monitor(step)
        assert (found is None) == (step % 2 == 1)
    assert [r["step"] for r in monitor.records] == [0, 2, 4, 6]
    svrg = [r["svrg"].average_variance for r in monitor.records]
    assert svrg[0] < 1e-30 and svrg[2] < 1e-30 and svrg[1] > 1e-12 and svrg[3] > 1e-12
    record = json.loads(json.dumps(monitor.to_json(), allow_nan=False))
    assert record[1]["sgb"]["average_variance"] == monitor.records[1]["sgb"].average_variance


def test_as_the_callback_of_a_training():
    problem = problems.load("digits-tanh")
    monitor = noise.Monitor(problem.model, problem.loss_fn, problem.train, 10, ["sgb"], draws=2)
    problems.train(problem, steps=6, evaluations=2, callback=monitor)
    assert [r["step"] for r in monitor.records] == [0, 3, 6]


def test_clusters_follow_the_training():
    model, xy = net(), data(40)
    clusters = noise.GradientClustering(model, CE, 4).fit(xy)
    sampler = noise.StratifiedBatchSampler(
        clusters.assignments, batch_size=8, allocation="neyman", deviations=clusters.deviations
    )
    reclustering = noise.Reclustering(clusters, xy, sampler, every=3, passes=1)
    due = [reclustering(step) for step in steps(model, xy, 7)]
    assert due == [False, False, False, True, False, False, True]
    assert clusters.passes == 5
    assert torch.equal(sampler.assignments, clusters.assignments) and sampler.samples_per_batch == 8
    noise.Reclustering(clusters, xy, every=1, passes=1)(1)
    assert clusters.passes == 6


def test_training_with_weighted_batches_descends():
    model, (x, y) = net(), data(60)
    clusters = noise.GradientClustering(model, CE, 6).fit((x, y))
    sampler = noise.StratifiedBatchSampler(clusters.assignments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    each = torch.nn.CrossEntropyLoss(reduction="none")
    start = float(CE(model(x), y).detach())
    for _ in range(10):
        for batch in sampler:
            optimizer.zero_grad()
            (sampler.weights(batch) * each(model(x[batch]), y[batch])).mean().backward()
            optimizer.step()
    assert float(CE(model(x), y).detach()) < 0.9 * start


@pytest.mark.parametrize("options", [{"every": 0}, {"refresh": 0}, {"draws": 0}])
def test_counts_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is 0"):
        noise.Monitor(net(), CE, data(60), 5, **options)
    if "every" in options:
        with pytest.raises(ValueError, match="every is 0"):
            noise.Reclustering(noise.GradientClustering(net(), CE, 2), data(60), every=0)
