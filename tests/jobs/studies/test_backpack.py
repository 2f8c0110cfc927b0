"""The study of BackPACK's experiments in miniature: its page, its record, and what is known to be robust."""

import json
import re

import pytest

from paraboloid.jobs import studies
from paraboloid.jobs.studies.backpack import METHODS, QUANTITIES, Plan, _affordable, pieces, reading
from paraboloid.jobs.studies.comparing import summary

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "backpack", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


def test_curvature_trains(record):
    (problem,) = record["results"]["problems"]
    found = summary.summaries(problem)
    assert set(found) == {"SGD-m", "DiagGGN, Monte Carlo"}
    assert found["DiagGGN, Monte Carlo"].final < 2.2
    assert found["DiagGGN, Monte Carlo"].accuracy > 0.2


def test_what_costs_too_much_is_left_out_and_said():
    costs = [{"quantity": q, "gradients": 134.5 if q == "kfra" else 2.0} for q in QUANTITIES]
    methods, left_out = _affordable(Plan(), costs)
    assert list(methods) == [name for name in METHODS if name != "KFRA"]
    assert left_out == ["KFRA was left out: its curvature costs 130 gradients here."]


def test_every_quantity_is_timed_beside_a_gradient(record):
    (problem,) = record["results"]["problems"]
    assert [row["quantity"] for row in problem["costs"]] == list(QUANTITIES)
    for row in problem["costs"]:
        assert 0 < row["low"] <= row["gradients"] <= row["high"]


def test_the_record_is_strict_json_and_draws_a_page(record):
    assert json.loads(studies.to_json(record)) == record
    page = studies.page(json.loads(studies.to_json(record)))
    assert len(re.findall(r'<svg class="figure"', page)) == 2
    for sentence in record["findings"]:
        assert sentence.endswith(".")


def test_progress_ends_where_it_announced(record):
    assert {part: (n, n) for part, n in pieces(Plan.tiny()).items()} == CALLS


def test_every_curvature_has_the_same_grid():
    assert {len(m.grid) for m in METHODS.values()} == {9}
    assert len([m for m in METHODS.values() if m.grid == METHODS["KFAC"].grid]) == 5


def test_early_is_the_point_nearest_to_three_tenths():
    curve = [{"epoch": float(e), "seconds": 0.0, "train": 10.0 - e, "test": None} for e in range(11)]
    s = summary.Summary("KFAC", "ours", {}, curve, 0.0, None, 0.0, None, 1.0)
    assert reading.early(s) == 7


def test_progress_at_first_is_compared_with_the_faster_of_both():
    def of(name, values):
        curve = [{"epoch": float(e), "seconds": 0.0, "train": v, "test": v} for e, v in enumerate(values)]
        return summary.Summary(name, "", {}, curve, values[-1], None, values[-1], None, 1.0)

    found = {"SGD-m": of("SGD-m", [9, 8, 7, 1]), "Adam": of("Adam", [9, 2, 2, 2])}
    assert reading._fastest(found, ("SGD-m", "Adam")).name == "Adam"
    assert summary.best(found, ("SGD-m", "Adam")).name == "SGD-m"
    assert summary.inside("Kronecker factors are") == "Kronecker factors are"
    assert summary.inside("They are") == "they are"
