"""Gradient clustering: what is known exactly, the failure of fixed sizes, resuming, and its errors."""

import io

import models
import oracle
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from paraboloid import problems
from paraboloid.noise import GradientClustering, StratifiedBatchSampler
from paraboloid.noise.centres import Centres
from paraboloid.noise.gradients import Gradients
from paraboloid.problems.random_features import random_features

CE = nn.CrossEntropyLoss()


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.mlp().double()


def layer(outputs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, outputs).double()


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


def gradients(model, x, y):
    g = oracle.sample_grads(CE, model(x), y, dict(model.named_parameters()))
    return torch.cat([v.flatten(1) for v in g.values()], 1)


def stratified_variance(g, assignments):
    """N^-2 sum_k N_k sum_{i in k} ||g_i - mean_k||^2."""
    total = 0.0
    for k in assignments.unique():
        mine = g[assignments == k]
        total += len(mine) * (mine - mine.mean(0)).square().sum()
    return float(total) / len(g) ** 2


def simple_variance(g, size):
    N = len(g)
    return float((g - g.mean(0)).square().sum() / N / size * (N - size) / (N - 1))


# --- what is known exactly ---------------------------------------------------------------------------------------


def test_distances_are_those_to_the_centres_that_assigned():
    model, (x, y) = net(), data(30)
    clusters = GradientClustering(model, CE, 4).fit((x, y), batch_size=7, passes=2)
    before = torch.cat([c.dense().flatten(1) for c in clusters.centres.values()], 1)
    clusters.fit((x, y), batch_size=7, passes=1)
    g = gradients(model, x, y)
    expected = (g - before[clusters.assignments]).square().sum(1)
    torch.testing.assert_close(clusters.distances, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(clusters.square_norms, g.square().sum(1), rtol=1e-10, atol=1e-13)
    assert clusters.sizes.sum() == 30 and clusters.passes == 3
    torch.testing.assert_close(clusters.distortions.sum(), clusters.distances.sum())


def test_the_batch_size_of_a_pass_changes_nothing():
    """The sizes advance sample by sample whatever the batches are."""
    model, xy = net(), data(40)
    one, other = (GradientClustering(model, CE, 5).fit(xy, batch_size=b, passes=4) for b in (1, 40))
    assert torch.equal(one.assignments, other.assignments)
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 2])
def test_singular_updates_tend_to_the_truncated_mean_gradient(rank):
    """With one cluster the assignment is settled: subspace iteration on the mean gradient of each parameter."""
    model, (x, y) = net(), data(30)
    clusters = GradientClustering(model, CE, 1, rank=rank).fit((x, y), passes=60)
    mean = oracle.grads(CE(model(x), y), dict(model.named_parameters()))
    for name, centres in clusters.centres.items():
        if mean[name].dim() == 1:
            best = mean[name]
        else:
            U, S, V = torch.linalg.svd(mean[name], full_matrices=False)
            best = U[:, :rank] * S[:rank] @ V[:rank]
        torch.testing.assert_close(centres.dense()[0], best, rtol=1e-6, atol=1e-9)


def test_mean_updates_are_the_means_of_inputs_and_output_gradients():
    model, (x, y) = layer(3), data(20)
    clusters = GradientClustering(model, CE, 1, update="mean").fit((x, y), batch_size=6, passes=1)
    delta = torch.softmax(model(x).detach(), 1) - nn.functional.one_hot(y, 3)
    torch.testing.assert_close(clusters.centres["weight"].dense()[0], torch.outer(delta.mean(0), x.mean(0)))
    torch.testing.assert_close(clusters.centres["bias"].dense()[0], delta.mean(0))


def test_duplicates_have_no_variance():
    """As many clusters as different samples: every cluster holds copies of one, and the estimate is exact."""
    model, (x, y) = net(), data(6)
    x, y = x.repeat(5, 1), y.repeat(5)
    clusters = GradientClustering(model, CE, 6, rank=3).fit((x, y), passes=30)
    assert len({tuple(clusters.assignments[i::6].tolist()) for i in range(6)}) == 6
    g = gradients(model, x, y)
    assert stratified_variance(g, clusters.assignments) < 1e-25
    sampler = StratifiedBatchSampler(clusters.assignments)
    for batch in sampler:
        estimate = (sampler.weights(batch).double()[:, None] * g[batch]).mean(0)
        torch.testing.assert_close(estimate, g.mean(0), rtol=1e-6, atol=1e-8)


def test_one_cluster_is_plain_sampling_and_one_for_each_sample_is_exact():
    model, (x, y) = net(), data(12)
    g = gradients(model, x, y)
    single = GradientClustering(model, CE, 1).fit((x, y))
    assert single.assignments.tolist() == [0] * 12
    assert stratified_variance(g, single.assignments) == pytest.approx(simple_variance(g, 1))
    each = GradientClustering(model, CE, 12).fit((x, y), passes=2)
    assert sorted(each.assignments.tolist()) == list(range(12))
    assert stratified_variance(g, each.assignments) == 0


def test_centres_take_the_memory_of_their_sides():
    problem = problems.load("digits-cnn")
    clusters = GradientClustering(problem.model, problem.loss_fn, 10, rank=2)
    clusters.fit(problem.train[:64], passes=1)
    assert clusters.elements == 10 * (2 * (8 + 9) + 8 + 2 * (16 + 72) + 16 + 2 * (10 + 256) + 10)
    assert clusters.centres["conv2.weight"].dense().shape == (10, 16, 8, 3, 3)


@pytest.mark.parametrize("name", ["residual cnn", "gpt", "vit", "tagger", "low rank"])
def test_layers_of_every_kind_are_clustered(name):
    model, x = models.make(name, 12)
    shape = model(*(x if isinstance(x, tuple) else (x,))).shape
    y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(0))
    items = [((tuple(t[i] for t in x) if isinstance(x, tuple) else x[i]), y[i]) for i in range(12)]
    clusters = GradientClustering(model, CE, 3, seed=1).fit(items, batch_size=5, passes=6)
    truth = oracle.sample_grads(CE, model(*(x if isinstance(x, tuple) else (x,))), y, {
        k: p for k, p in model.named_parameters() if p.requires_grad
    })  # fmt: skip
    torch.testing.assert_close(
        clusters.square_norms, sum(g.flatten(1).square().sum(1) for g in truth.values()), rtol=1e-9, atol=1e-12
    )
    assert (clusters.sizes > 0).all()


# --- it works, and fixed sizes fail ------------------------------------------------------------------------------


def test_running_sizes_lower_the_variance_and_fixed_ones_raise_it():
    problem = problems.load("random-features")
    problems.train(problem, steps=500, evaluations=1)
    x, y = problem.train.tensors
    features = torch.relu(problem.model.features(x)).detach()
    delta = (torch.softmax(problem.model.output(features).detach(), 1) - nn.functional.one_hot(y, 2)).double()
    g = torch.cat([(delta[:, :, None] * features[:, None]).flatten(1), delta], 1)
    ratio = {}
    for counts in ("running", "fixed"):
        clusters = GradientClustering(problem.model, problem.loss_fn, 10, counts=counts).fit(problem.train, passes=3)
        ratio[counts] = stratified_variance(g, clusters.assignments) / simple_variance(g, 10)
    assert ratio["running"] < 0.75
    assert ratio["fixed"] > 3


def test_many_duplicates_are_found():
    problem = random_features(duplicated=0.9)
    x, y = problem.train.tensors
    clusters = GradientClustering(problem.model, problem.loss_fn, 10).fit(problem.train, passes=3)
    features = torch.relu(problem.model.features(x)).detach()
    delta = (torch.softmax(problem.model.output(features).detach(), 1) - nn.functional.one_hot(y, 2)).double()
    g = torch.cat([(delta[:, :, None] * features[:, None]).flatten(1), delta], 1)
    assert stratified_variance(g, clusters.assignments) < 0.3 * simple_variance(g, 10)


# --- options -----------------------------------------------------------------------------------------------------


def test_a_subset_of_layers():
    model, (x, y) = net(), data(20)
    whole = GradientClustering(model, CE, 3, layers=["2"]).fit((x, y))
    assert list(whole.centres) == ["2.weight", "2.bias"]
    assert list(GradientClustering(model, CE, 3, layers=["0.bias"]).fit((x, y)).centres) == ["0.bias"]
    by = GradientClustering(model, CE, 3, layers=lambda name: name.startswith("2")).fit((x, y))
    assert torch.equal(by.assignments, whole.assignments)


def test_online_mode_forgets():
    """With decay the sizes are decayed averages of the batches' counts; it clusters as well."""
    model, (x, y) = net(), data(60)
    clusters = GradientClustering(model, CE, 4, decay=0.9).fit((x, y), batch_size=10, passes=10)
    assert clusters.updates == 60
    assert clusters.mass.sum() == pytest.approx(10 * (1 - 0.9**60))
    g = gradients(model, x, y)
    assert stratified_variance(g, clusters.assignments) < simple_variance(g, 4)


def test_online_means_are_decayed_means():
    model, (x, y) = layer(3), data(20)
    clusters = GradientClustering(model, CE, 1, update="mean", decay=0.5).fit((x, y), batch_size=10, passes=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    first, second = x[order[:10]].mean(0), x[order[10:]].mean(0)
    torch.testing.assert_close(clusters.centres["weight"].right[0, 0, 0], (0.5 * first + second) / 1.5)


def test_online_singular_updates_tend_to_the_mean_gradient():
    model, (x, y) = layer(2), data(20)
    y = y.clamp(max=1)  # two classes: the mean gradient has rank 1
    clusters = GradientClustering(model, CE, 1, decay=0.5).fit((x, y), batch_size=20, passes=80)
    mean = oracle.grads(CE(model(x), y), dict(model.named_parameters()))
    torch.testing.assert_close(clusters.centres["weight"].dense()[0], mean["weight"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(clusters.centres["bias"].dense()[0], mean["bias"], rtol=1e-6, atol=1e-9)


def test_a_tiny_cluster_takes_half_of_the_most_distorted_one():
    model, xy = net(), data(40)
    clusters = GradientClustering(model, CE, 4, counts="none", min_size=0).fit(xy, passes=1)
    had = clusters.sizes
    split = GradientClustering(model, CE, 4, counts="none", min_size=5).fit(xy, passes=1)
    small, large = int(had.argmin()), int((had * clusters.distortions).argmax())
    assert had[small] < 5
    expected = had.clone()
    expected[small] += had[large] // 2
    expected[large] -= had[large] // 2
    assert split.sizes.tolist() == expected.tolist()
    assert torch.equal(split.centres["0.weight"].dense()[small], split.centres["0.weight"].dense()[large])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_resumed_fit_equals_the_uninterrupted_one(decay):
    model, xy = net(), data(40)
    options = {"decay": decay, "min_size": 3, "seed": 5}
    whole = GradientClustering(model, CE, 6, **options).fit(xy, 7, passes=5)
    first = GradientClustering(model, CE, 6, **options).fit(xy, 7, passes=2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = GradientClustering(model, CE, 6, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    second.fit(xy, 7, passes=3)
    assert torch.equal(second.assignments, whole.assignments) and torch.equal(second.distances, whole.distances)
    assert second.passes == 5
    for k, c in whole.centres.items():
        assert torch.equal(c.left, second.centres[k].left) and torch.equal(c.right, second.centres[k].right)


def test_passes_until_nothing_changes():
    clusters = GradientClustering(net(), CE, 3).fit(data(20), passes=2, until_stable=True)
    assert clusters.converged and clusters.changed == 0 and clusters.passes <= 50
    seen = []
    GradientClustering(net(), CE, 3).fit(data(20), 8, passes=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(7, 40), (14, 40), (20, 40), (27, 40), (34, 40), (40, 40)]


def test_nothing_is_left_behind():
    model, xy = net(), data(20)
    model.train()
    state, kept = torch.get_rng_state(), {k: p.detach().clone() for k, p in model.named_parameters()}
    GradientClustering(model, CE, 3).fit(TensorDataset(*xy))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None and torch.equal(p, kept[k]) for k, p in model.named_parameters())


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_clusters": 0}, "num_clusters is 0; expected an integer of at least 1"),
        ({"rank": 1.5}, "rank is 1.5; expected an integer of at least 1"),
        ({"min_size": -1}, "min_size is -1; expected an integer of at least 0"),
        ({"counts": "frozen"}, "counts is 'frozen'; expected one of"),
        ({"update": "svd"}, "update is 'svd'; expected one of"),
        ({"update": "mean", "rank": 2}, "rank is 2 with update='mean', which has rank 1"),
        ({"decay": 1.0}, r"decay is 1.0; expected a number in \[0, 1\)"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        GradientClustering(net(), CE, **options)


def test_misuse_is_explained():
    clusters = GradientClustering(net(), CE, 3)
    with pytest.raises(ValueError, match=r"no assignments yet; call fit\(dataset\) first"):
        _ = clusters.assignments
    with pytest.raises(ValueError, match="num_clusters is 3 for 2 samples; expected at most 2"):
        clusters.fit(data(2))
    with pytest.raises(ValueError, match="passes is 0; expected an integer of at least 1"):
        clusters.fit(data(5), passes=0)
    with pytest.raises(ValueError, match="layers names 'head', which is no parameter and no module"):
        GradientClustering(net(), CE, 3, layers=["head"]).fit(data(5))
    with pytest.raises(ValueError, match="the state has 3 clusters and this clustering has 4"):
        GradientClustering(net(), CE, 4).load_state_dict(clusters.fit(data(5)).state_dict())
    with pytest.raises(ValueError, match="the dataset is empty"):
        Gradients(net(), CE, data(0))
    x, y = data(5)
    with pytest.raises(ValueError, match="the loss is nan; expected a finite number"):
        clusters.fit((x * float("nan"), y))
    with pytest.raises(ValueError, match="ran in training mode"):
        GradientClustering(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double(), CE, 2).fit(data(5))


def test_a_parameter_used_otherwise_in_another_batch():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = GradientClustering(nn.Sequential(nn.Linear(4, 4)).double(), nn.MSELoss(), 2)
    clusters.centres["0.weight"] = Centres(*(torch.zeros(2, 1, 1, n) for n in (3, 4)), torch.Size([3, 4]))
    with pytest.raises(ValueError, match=r"blocks \[G, p, q\] = \[1, 4, 4\], but its centres have \[1, 3, 4\]"):
        clusters.fit((x, x), 5, 1)
