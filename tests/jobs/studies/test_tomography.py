"""The tomography study in miniature: its record, its page, and its scores against closed forms."""

import json
import math

import pytest
import torch

import paraboloid as pb
from paraboloid.jobs import studies
from paraboloid.jobs.studies.tomography import Plan, pieces, reading, scores
from paraboloid.problems import pictures

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "tomography", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


def test_the_record_is_strict_json_and_draws_a_page(record):
    assert json.loads(studies.to_json(record)) == record
    assert {part: (total, total) for part, total in pieces(Plan.tiny()).items()} == CALLS
    page = studies.page(json.loads(studies.to_json(record)))
    assert page.count('<svg class="figure"') == 3
    assert len(record["findings"]) == 3 + 1 + 2
    assert "The true image is likelier under the posterior" in record["findings"][0]
    (agreement,) = record["results"]["agreement"]
    assert abs(agreement["sampled"] - agreement["exact"]) < 4 * agreement["error"] + 0.05 * abs(agreement["exact"])
    assert 0.6 < agreement["std"] < 1.6  # of eight samples
    (cell,) = reading.cells(record["results"])
    assert cell["density"] > cell["dropout"] and cell["images"] == 1
    (choice,) = record["results"]["choices"]
    assert choice["angles"] == [4, 6] and len(choice["chosen"]) == 2 and choice["gains"][0] > choice["gains"][1] > 0
    assert len(record["results"]["maps"][0]["maps"]["std"]) == 10


def test_scores_of_an_image():
    truth = torch.zeros(2, 8, dtype=torch.float64)
    truth[0] = 1.0
    error = torch.linspace(0, 1.5, 16, dtype=torch.float64).view(2, 8)
    std = 0.5 * error + 0.1
    found = scores.of(truth - error, std, truth, 0.0)
    assert found["psnr"] == pytest.approx(-10 * math.log10(float(error.square().mean())))
    assert found["density"] == pytest.approx(float(torch.distributions.Normal(0.0, std).log_prob(error).mean()))
    assert found["correlation"] == pytest.approx(1.0)
    assert found["inside"]["90"] == pytest.approx(float((error <= 1.6448536 * std).double().mean()))
    mse = float(error.square().mean())
    assert scores.isotropic(mse, []) == pytest.approx(-math.log(2 * math.pi * math.e * mse) / 2)
    assert scores.isotropic(mse, [2 * mse]) < scores.isotropic(mse, [])
    A = pb.tomography.ParallelBeam(16, 9)  # of more than 100 rays
    values = torch.linalg.svdvals(torch.from_numpy(A.to_scipy().toarray()))[:100]
    assert scores.carried(A, 0.3) == pytest.approx(0.3 * float((values**-2).sum()) / 256, rel=1e-3)
    few = pb.tomography.ParallelBeam(8, 3)  # some of whose rays miss the image
    inverse = torch.linalg.pinv(torch.from_numpy((few.to_scipy().T @ few.to_scipy()).toarray()), rtol=1e-12)
    assert scores.carried(few, 0.3) == pytest.approx(0.3 * float(inverse.diagonal().mean()), rel=0.05)


def test_pictures():
    characters = pictures.draw_characters(2, 0)
    assert characters.shape == (2, 28, 28) and characters.min() >= 0 and 0.5 < characters.max() < 1
    phantom = pictures.phantom(64)
    assert (
        phantom.shape == (64, 64)
        and phantom.max() == pytest.approx(1.0)
        and phantom.min() == pytest.approx(0.0, abs=1e-6)
    )
    assert phantom[32, 32] == pytest.approx(0.2, abs=0.12) and phantom[0].max() == 0
    assert phantom[:, 20].argmax() < 32  # the skull
