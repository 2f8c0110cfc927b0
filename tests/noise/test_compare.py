"""Estimators of the mean gradient and their variance, against exact values."""

import json
import math

import oracle
import pytest
import torch
from noise.test_clustering import CE, data, gradients, net, simple_variance, stratified_variance
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, WeightedRandomSampler

from paraboloid import noise
from paraboloid.noise.comparison import measure
from paraboloid.noise.gradients import Gradients

E = 1000  # draws of the statistical tests


def average(model, xy, estimator, batch_size=4, draws=E, **options):
    return noise.compare(model, CE, xy, batch_size, [estimator], draws, reference="full", **options)[estimator.name]


def close(found, error, exact):
    assert abs(found - exact) < 4 * error, f"{found} ± {error}, expected {exact}"


# --- gradients ---------------------------------------------------------------------------------------------------


def test_mean_gradients_with_weights_and_at_other_parameters():
    model, (x, y) = net(), data(9)
    g = gradients(model, x, y)
    mean = Gradients(model, CE, (x, y), chunk=2)
    torch.testing.assert_close(mean.full(), g.mean(0), rtol=1e-10, atol=1e-13)
    some, weights = torch.tensor([4, 2, 2, 8, 0]), torch.tensor([0.5, 1, 2, 0, 3])
    torch.testing.assert_close(
        mean.mean(some, weights), (weights.double()[:, None] * g[some]).mean(0), rtol=1e-10, atol=1e-13
    )
    other = net(1)
    at = dict(other.named_parameters())
    torch.testing.assert_close(mean.full(at), gradients(other, x, y).mean(0), rtol=1e-10, atol=1e-13)
    assert all(p.grad is None for p in [*model.parameters(), *other.parameters()])


def test_gradients_are_of_the_unreduced_loss():
    model, (x, y) = net(), data(6)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double(), reduction="sum")
    g = oracle.sample_grads(loss, model(x), y, dict(model.named_parameters()))
    g = torch.cat([v.flatten(1) for v in g.values()], 1)
    torch.testing.assert_close(Gradients(model, loss, (x, y)).full(), g.mean(0), rtol=1e-10, atol=1e-13)


# --- variances ---------------------------------------------------------------------------------------------------


def test_sgb_and_twice_the_batch():
    model, (x, y) = net(), data(200)
    g = gradients(model, x, y)
    D = g.shape[1]
    for estimator, size in ((noise.SGB(), 4), (noise.SGB(2), 8)):
        m = average(model, (x, y), estimator)
        close(m.average_variance, m.average_variance_error, simple_variance(g, size) / D)
    assert simple_variance(g, 8) / simple_variance(g, 4) == pytest.approx(0.5, abs=0.02)


def test_normalised_variances():
    """In the limit of many draws: mean_j var_j / (var_j + g_j^2 + eps / E), and the same with shared sums."""
    model, (x, y) = net(), data(60)
    g = gradients(model, x, y)
    N = len(g)
    variance = (g - g.mean(0)).square().mean(0) / 4 * (N - 4) / (N - 1)
    second = variance + g.mean(0).square()
    m = average(model, (x, y), noise.SGB())
    close(m.normalized_variance, m.normalized_variance_error, float((variance / second).mean()))
    exact = float(variance.sum() / second.sum())
    close(m.shared_normalized_variance, m.shared_normalized_variance_error, exact)
    assert 0 < m.normalized_variance_error < 0.02


def test_the_authors_reference_adds_its_own_noise():
    """Around the mean of E further draws the variance is 1 + 1/E times larger; a single sampled estimate shows it."""
    model, xy = net(), data(60)
    g = gradients(model, *xy)
    mine = Gradients(model, CE, xy)
    sgb = noise.SGB()
    sgb.prepare(mine, 4)
    values = [
        measure(sgb, mine, 2, torch.Generator().manual_seed(s)).average_variance for s in range(400)
    ]  # fmt: skip
    values = torch.tensor(values)
    close(float(values.mean()), float(values.std()) / 20, 1.5 * simple_variance(g, 4) / g.shape[1])


def test_stratified_by_clusters_as_proposition_3_1_says():
    model, (x, y) = net(), data(50)
    g = gradients(model, x, y)
    gc = noise.GC()
    m = average(model, (x, y), gc)
    assert gc.clusters is not None and gc.clusters.num_clusters == 4 and gc.clusters.passes >= 10
    close(m.average_variance, m.average_variance_error, stratified_variance(g, gc.clusters.assignments) / g.shape[1])
    assert stratified_variance(g, gc.clusters.assignments) < 0.9 * simple_variance(g, 4)


def test_random_equal_strata_are_plain_sampling():
    """Over random partitions into B equal strata, the variance is SG-B's."""
    model, (x, y) = net(), data(40)
    g = gradients(model, x, y)
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(
        [stratified_variance(g, torch.randperm(40, generator=generator) % 4) for _ in range(500)], dtype=torch.float64
    )
    close(float(values.mean()), float(values.std()) / 500**0.5, simple_variance(g, 4))
    strata = noise.Stratified(torch.randperm(40, generator=generator) % 4)
    m = average(model, (x, y), strata)
    exact = stratified_variance(g, strata.assignments) / g.shape[1]
    close(m.average_variance, m.average_variance_error, exact)


def test_no_variance_where_there_is_none():
    model, xy = net(), data(12)
    m = noise.compare(model, CE, xy, 12, ["sgb", "svrg", "gc"], draws=5, reference="full")
    assert m["svrg"].average_variance < 1e-30  # the reference is where it is measured
    assert m["sgb"].average_variance < 1e-30  # the batch is all data
    assert m["gc"].average_variance < 1e-30  # every sample is a cluster
    assert m["svrg"].normalized_variance == pytest.approx(0, abs=1e-12)
    assert noise.compare(model, CE, xy, 3, ["svrg"])["svrg"].average_variance == 0


def test_svrg_away_from_its_reference():
    """Its variance is that of g(now) - g(reference)."""
    model, (x, y) = net(), data(50)
    mine, svrg = Gradients(model, CE, (x, y)), noise.SVRG()
    svrg.prepare(mine, 5)
    svrg.refresh(mine)
    before = gradients(model, x, y)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.ones_like(p))
    now = gradients(model, x, y)
    m = measure(svrg, mine, E, torch.Generator().manual_seed(0), mine.full())
    close(m.average_variance, m.average_variance_error, simple_variance(now - before, 5) / now.shape[1])


def test_samplers_of_the_user():
    model, (x, y) = net(), data(40)
    g = gradients(model, x, y)
    generator = torch.Generator().manual_seed(0)
    plain = BatchSampler(RandomSampler(range(40), generator=generator), 4, drop_last=True)
    p = torch.linspace(1, 3, 40).double()
    p = p / p.sum()
    importance = noise.Sampled(
        BatchSampler(WeightedRandomSampler(p.tolist(), 40, generator=generator), 4, False),
        weights=lambda i: 1 / (40 * p[i]),
    )
    found = noise.compare(model, CE, (x, y), 4, {"mine": plain, "importance": importance}, E, reference="full")
    close(found["mine"].average_variance, found["mine"].average_variance_error, simple_variance(g, 4) / g.shape[1])
    weighted = g / (40 * p[:, None])
    variance = float((p[:, None] * (weighted - g.mean(0)).square()).sum()) / 4 / g.shape[1]
    close(found["importance"].average_variance, found["importance"].average_variance_error, variance)


# --- the result --------------------------------------------------------------------------------------------------


def test_the_comparison_as_table_and_as_json():
    calls = []
    found = noise.compare(net(), CE, data(40), draws=3, progress=lambda *a: calls.append(a))
    assert list(found) == ["sgb", "sg2b", "svrg", "gc"] and found.batch_size == 10 and len(found) == 4
    assert ("sgb", 6, 6) in calls and calls[-1] == ("gc", 6, 6) and any(name == "gc clustering" for name, *_ in calls)
    assert found.table().count("\n") == 5 and "sgb" in repr(found)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["estimators"]["gc"]["average_variance"] == found["gc"].average_variance
    ratio, error = found.ratio("gc")
    assert ratio == found["gc"].average_variance / found["sgb"].average_variance and error > 0
    assert all(map(math.isnan, found.ratio("sgb", to="svrg")))
    again = noise.compare(net(), CE, data(40), draws=3)
    assert again.to_json() == found.to_json()
    single = noise.compare(net(), CE, data(40), estimators=["sgb"], draws=1)
    assert math.isnan(single["sgb"].average_variance_error)
    assert single.to_json()["estimators"]["sgb"]["normalized_variance_error"] is None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"reference": "exact"}, "reference is 'exact'"),
        ({"estimators": ["sga"]}, "estimator 'sga' is not known"),
        ({"estimators": [3]}, "an estimator is a int"),
        ({"estimators": []}, "expected at least one, with different names"),
        ({"estimators": ["sgb", "sgb"]}, "expected at least one, with different names"),
        ({"batch_size": 30}, "'sg2b' takes batches of 60 samples and there are 40"),
        ({"estimators": [noise.Stratified(torch.zeros(3).long())]}, "'stratified' has 3 assignments for 40 samples"),
        ({"estimators": {"empty": [[]]}}, "a batch of no samples was drawn"),
        ({"estimators": {"none": []}}, "the sampler of 'none' yielded no batch"),
        ({"estimators": ["svrg"], "batch_size": 50}, "a batch of 50 samples was asked for and there are 40"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        noise.compare(net(), CE, data(40), **options)


def test_gradients_that_are_not_finite():
    x, y = data(40)
    with pytest.raises(ValueError, match="the gradient is NaN or infinite"):
        noise.compare(net(), CE, (x / 0, y), estimators=["sgb"])


def test_an_estimator_that_was_not_compared():
    with pytest.raises(KeyError, match="'gc' was not compared"):
        noise.compare(net(), CE, data(40), estimators=["sgb"], draws=1)["gc"]


def test_a_default_device_that_is_not_the_models():
    model, xy = net(), data(12)

    def measured():
        clusters = noise.GradientClustering(model, CE, num_clusters=3, seed=0).fit(xy, batch_size=4, passes=2)
        found = noise.compare(model, CE, xy, 3, ["sgb", "sg2b", "svrg", "gc"], draws=3, seed=0)
        return clusters.assignments, {name: found[name].average_variance for name in ("sgb", "sg2b", "svrg", "gc")}

    assignments, variances = measured()
    torch.set_default_device("meta")
    try:
        again, found = measured()
    finally:
        torch.set_default_device(None)
    assert again.equal(assignments) and found == variances
