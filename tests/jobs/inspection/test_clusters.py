"""The clusters of a report, and the record of the noise alone."""

import json
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from paraboloid.jobs.inspection import NOISE_ONLY, Plan, inspect
from paraboloid.jobs.inspection.clusters import clustered
from paraboloid.jobs.inspection.subject import subject
from paraboloid.jobs.pictures import picture
from paraboloid.problems import Problem, Training
from paraboloid.report import from_json, render, to_json

TINY = Plan.quick(batch_sizes=(4,), checkpoints=3, draws=3)


def problem(channels=1, samples=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, channels, 6, 5, generator=generator)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(channels, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    return Problem(
        model, nn.CrossEntropyLoss(), (x, y), (x, y), name="tiny", training=Training("sgd", 0.1, batch_size=5, epochs=2)
    )


@pytest.fixture(scope="module", params=[1, 3])
def record(request):
    return inspect(problem(request.param), TINY, stages=NOISE_ONLY)


def test_the_record_of_the_noise_alone(record):
    assert list(record) == ["problem", "training", "noise"]
    assert from_json(to_json(record)) == json.loads(to_json(record))
    assert record["problem"]["command"] == "paraboloid noise tiny --seed 0 --quick --draws 3 --batch-sizes 4"
    points = record["noise"]["checkpoints"]
    assert all(list(p["estimators"]) == ["sgb", "sg2b", "svrg", "gc"] for p in points)
    assert points[0]["estimators"]["svrg"]["average_variance"] == 0  # its reference is there
    assert points[-1]["estimators"]["svrg"]["average_variance"] > 0  # and here the checkpoint before
    assert record["noise"]["reading"][-1].startswith("A batch of 10 with one sample from each gradient cluster has ")


def test_its_page_shows_the_images(record):
    page = render(record)
    assert page.count('<svg class="figure"') == 3
    assert "Clusters of the samples by their gradients" in page and "Estimators of the gradient" in page
    assert "Gradient clusters minimise" in page and "Curvature</h3>" not in page
    sources = re.findall(r'<image[^>]*href="([^"]{22})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64") for source in sources)
    assert page == render(record)


def test_clusters_hold_all_samples_and_lower_the_variance():
    found = clustered(subject(problem(samples=60), 100, 0), 0, lambda: None)
    assert sum(c["size"] for c in found["clusters"]) == 60 and found["batch_size"] == 10
    assert 0 < found["variance_ratio"] < 0.9
    first = found["clusters"][0]
    indices = [sample["index"] for sample in (*first["prototypes"], *first["outliers"])]
    assert len(set(indices)) == len(indices)
    assert {sample["target"] for sample in first["prototypes"]} <= {0, 1}


def test_fewer_samples_than_clusters():
    found = clustered(subject(problem(samples=4), 100, 0), 0, lambda: None)
    assert found["batch_size"] == 4 and found["variance_ratio"] is None


def test_what_is_anpicture():
    grey = picture(torch.linspace(0, 1, 16).view(1, 4, 4))
    assert len(grey) == 4 and grey[0][0] == 0 and grey[-1][-1] == 255
    assert all(a <= b for a, b in pairwise([v for row in grey for v in row]))
    assert torch.tensor(picture(torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)))).shape == (4, 5, 3)
    assert picture(torch.zeros(5, 5))[0] == [0] * 5
    for other in (torch.zeros(9), torch.zeros(2, 5, 5), torch.zeros(4, 100), torch.zeros(1, 4, 4).long()):
        assert picture(other) is None
