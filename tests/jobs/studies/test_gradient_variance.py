"""The gradient-variance study in miniature: its page, its record, and the effects that are known to be robust."""

import json

import pytest
import torch

from paraboloid import problems
from paraboloid.jobs import studies
from paraboloid.jobs.studies import gradient_variance
from paraboloid.jobs.studies.gradient_variance import Plan, pieces, reading, variants

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "gradient-variance", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


def test_duplicates_make_clustering_better_and_twice_the_batch_is_half(record):
    plain, copied = record["results"]["features"]
    assert reading.ratio(copied["points"], "gc") < 0.3 < reading.ratio(plain["points"], "gc") < 1
    assert 0.2 < reading.ratio(plain["points"], "sg2b") < 0.8  # few draws of a heavy-tailed square
    (counts,) = record["results"]["counts"]
    assert counts["fixed"]["ratio"] > 1 > counts["running"]["ratio"]
    assert counts["fixed"]["largest"] > counts["running"]["largest"]


def test_the_record_is_strict_json_and_draws_a_page(record):
    assert json.loads(studies.to_json(record)) == record
    assert {part: (total, total) for part, total in pieces(Plan.tiny()).items()} == CALLS
    page = studies.page(json.loads(studies.to_json(record)))
    assert page.count('<svg class="figure"') == 3
    assert "seen" in page and "findings of the paper were seen here" in record["findings"][0]
    assert len(record["findings"]) == len(reading.claims(record["results"])) + 1


def test_variants():
    problem = problems.load("digits-mlp")
    N = len(problem.train)
    copied = variants.of(problem, "duplicates", 0).train
    assert len(copied) == N
    x, _ = problems.read(copied, torch.tensor([0, N - 1, N - 6]), torch.device("cpu"))
    first, _ = problems.read(problem.train, torch.arange(5), torch.device("cpu"))
    assert any(torch.equal(x[1], f) for f in first) and torch.equal(x[1], x[2])
    _, before = problems.read(problem.train, torch.arange(N), torch.device("cpu"))
    _, after = problems.read(variants.of(problem, "corrupted labels", 0).train, torch.arange(N), torch.device("cpu"))
    assert 0.1 < float((before != after).double().mean()) < 0.2
    assert variants.of(problem, "smoothed labels", 0).loss_fn.label_smoothing == variants.SMOOTHING
    with pytest.raises(ValueError, match="the variant is 'upside down'; expected one of"):
        variants.of(problem, "upside down", 0)


def test_data_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="holds no data that this study knows: found no train-images-idx3-ubyte"):
        gradient_variance.with_data(Plan(), str(tmp_path))
    import idx_files

    idx_files.write_mnist(tmp_path)
    plan = gradient_variance.with_data(Plan(), str(tmp_path))
    assert plan.problems == ("mnist-mlp", "mnist-cnn") and plan.data == str(tmp_path) and plan.batch_size == 128
    with pytest.raises(ValueError, match="the study 'debiasing' takes no data of your own"):
        studies.reproduce("debiasing", data=str(tmp_path))
