"""The page of what a network does not know: for classes, binary targets and real numbers."""

import json

import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import nn

from paraboloid.jobs import uncertainty as job
from paraboloid.jobs.uncertainty import scores
from paraboloid.jobs.uncertainty.reading import findings
from paraboloid.jobs.uncertainty.sections import limits
from paraboloid.jobs.uncertainty.unseen import unseen
from paraboloid.problems import Problem, Training

SETTINGS = Training("adam", lr=1e-2, batch_size=20, epochs=20)


def classes():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(160, 1, 6, 6, generator=g)
    y = (x[:, 0, :3].sum((1, 2)) > x[:, 0, 3:].sum((1, 2))).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 2))
    return Problem(model, nn.CrossEntropyLoss(), (x[:100], y[:100]), (x[100:], y[100:]), "halves", training=SETTINGS)


def curve():
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(160, 1, generator=g) - 1
    y = (3 * x).sin() + 0.2 * torch.randn(160, 1, generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    return Problem(model, nn.MSELoss(), (x[:100], y[:100]), (x[100:], y[100:]), "curve", training=SETTINGS)


@pytest.mark.parametrize("method", ["kron", "last-layer", "functional", "sampled"])
def test_classes(method):
    record = job.uncertainty(classes(), method, quick=True)
    results = record["results"]
    assert json.loads(job.to_json(record)) == record
    assert {row["name"] for row in results["unseen"]} >= {"uniform noise", "noise added", "turned by 90°"}
    assert all(0 <= row["area"] <= 1 for row in results["unseen"])
    told = [row["novelty_area"] for row in results["unseen"]]
    assert told == [None] * len(told) if method == "sampled" else all(0 <= area <= 1 for area in told)
    assert abs(results["matched"]["nll"] - results["network"]["nll"]) < (0.03 if method == "sampled" else 0.02)
    assert len(results["least_sure"]) == 18 and results["least_sure"][0]["image"] is not None
    sure = [row["confidence"] for row in results["least_sure"]]
    assert sure == sorted(sure)
    layers, whole = results["posterior"]["layers"], results["posterior"]["effective_dimension"]
    gamma = whole if method == "sampled" else sum(row["determined"] for row in layers)
    assert 0 < gamma < results["posterior"]["parameters"] == (18 if method == "last-layer" else 314)
    page = job.page(record)
    for title in ("Calibration", "What it has not seen", "Least sure", "What the data determined"):
        assert title in page
    assert record["findings"][0] in page.replace("&#39;", "'")
    assert page == job.page(json.loads(job.to_json(record)))
    assert record["command"] == f"paraboloid uncertainty halves --method {method} --seed 0 --quick"


@pytest.mark.parametrize("method", ["kron", "sampled"])
def test_a_curve_has_a_band_and_coverage(method):
    record = job.uncertainty(curve(), method, quick=True)
    results = record["results"]
    band = results["band"]
    assert len(band["x"]) == 200 and band["x"][0] < -1.4 and len(band["seen_x"]) == 100
    assert band["model_std"][0] > 2 * band["model_std"][100]  # beyond the data
    covered = {row["level"]: row["covered"] for row in results["matched"]["coverage"]}
    assert covered[0.1] <= covered[0.5] <= covered[0.9]
    assert "Prediction with a band" in job.page(record)
    assert "interval" in record["findings"][1]


def test_binary_targets_and_losses_without_predictions():
    problem = classes()
    x, y = problem.train.tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    targets = torch.stack([y, 1 - y, y], 1).float()
    pixels = Problem(model, nn.BCEWithLogitsLoss(), (x, targets), (x, targets), "pixels", training=SETTINGS)
    results = job.uncertainty(pixels, quick=True)["results"]
    assert results["kind"] == "bernoulli" and results["matched"]["count"] == 300
    with pytest.raises(ValueError, match="method is 'exact'; expected one of"):
        job.uncertainty(problem, "exact")


def test_scores():
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.05, 0.95]], dtype=torch.float64)
    found = scores.of_classes(p, torch.tensor([0, 1, 1, -100]))
    assert found["count"] == 3 and found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-torch.tensor([0.9, 0.2, 0.7]).log().mean().item())
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, generator=g).round(decimals=1), torch.randn(40, generator=g).round(decimals=1)
    assert scores.area(a, b) == pytest.approx(roc_auc_score([0] * 50 + [1] * 40, torch.cat([a, b])))
    mean, variance = torch.randn(500, generator=g).double(), torch.rand(500, generator=g).double() + 0.5
    y = mean + 1.3 * variance.sqrt() * torch.randn(500, generator=g)
    found = scores.of_gaussians(mean, variance, y)
    for row in found["coverage"]:
        low, high = norm.interval(row["level"], mean.numpy(), variance.sqrt().numpy())
        assert row["covered"] == pytest.approx(((y.numpy() >= low) & (y.numpy() <= high)).mean())
    assert found["nll"] == pytest.approx(-norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt().numpy()).mean())


def test_unseen_inputs():
    x = torch.randn(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = unseen(x, 0)
    assert all(z.shape == x.shape for z in found.values())
    assert found["uniform noise"].min() >= x.min() and found["uniform noise"].max() <= x.max()
    assert torch.equal(found["shuffled"].flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert torch.equal(found["uniform noise"], unseen(x, 0)["uniform noise"])
    tokens = unseen(torch.randint(5, (4, 7)), 1)
    assert list(tokens) == ["random tokens", "shuffled"] and tokens["random tokens"].dtype == torch.int64
    assert unseen({"a": x}, 0) == {}


@pytest.mark.parametrize(
    ("half", "most", "targets", "said"),
    [
        (0.58, 0.89, 112, "hold what they promise"),
        (0.58, 0.94, 100_000, "too wide"),
        (0.44, 0.89, 100_000, "too narrow"),
        (0.30, 0.89, 112, "too narrow"),
        (0.50, 0.80, 112, "too narrow"),
        (0.58, 0.85, 100_000, "another shape"),
    ],
)
def test_the_headline_of_a_regression_knows_how_many_targets_it_rests_on(half, most, targets, said):
    coverage = [{"level": 0.5, "covered": half}, {"level": 0.9, "covered": most}]
    scores = {"coverage": coverage, "count": targets, "nll": 1.0}
    results = {"matched": scores, "network": {"nll": 1.0}, "model_variance": 0.1, "test_noise_variance": 0.3}
    results["posterior"] = {"effective_dimension": 3.0, "parameters": 7, "samples": 5, "layers": []}
    assert said in findings({**results, "unseen": []})[0]


def test_a_band_that_would_hide_the_rest_is_cut_off():
    band = {"x": [0.0, 1.0], "mean": [0.0, 1.0], "std": [0.1, 0.2], "model_std": [0.1, 0.1], "seen_x": [0.5],
            "seen_y": [2.0]}  # fmt: skip
    assert limits(band) == (None, "")
    found, said = limits({**band, "std": [0.1, 40.0]})
    assert found == (-4.0, 6.0) and "at its widest it is ± 80" in said
