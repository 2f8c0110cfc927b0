"""The debiasing study in miniature: its page, its record, and the effects that are known to be robust."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from paraboloid import problems
from paraboloid.jobs import studies
from paraboloid.jobs.studies.debiasing import PARTS, Plan, pieces, reading
from paraboloid.jobs.studies.debiasing.newton_steps import decreases, iterates, proposals, steps
from paraboloid.jobs.studies.debiasing.trained import evaluations, pairs, states

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "debiasing", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


def trained(record, moment=1):
    return [row for row in record["results"]["table"]["rows"] if row["moment"] == moment]


def test_a_trained_network_overstates_its_top_curvature_less_with_larger_batches(record):
    small, large = trained(record)
    assert small["same"]["top"]["value"] > 1.3
    assert 1 < large["same"]["top"]["value"] < small["same"]["top"]["value"] - 0.2
    for row in trained(record):
        assert 0.75 < row["other"]["sum"]["value"] < 1.1


def test_at_initialisation_the_bias_is_small(record):
    assert all(0.98 < row["same"]["top"]["value"] < 1.15 for row in trained(record, 0))


def test_the_batch_gradient_follows_the_formula(record):
    for row in trained(record) + trained(record, 0):
        g = row["gradient"]
        assert abs(g["value"] - g["formula"]) < 4 * g["standard_error"] + 0.05


def test_a_debiased_posterior_of_few_samples_is_better_than_a_plain_one(record):
    (row,) = record["results"]["posteriors"]["rows"]
    assert row["debiased"]["value"] < row["single"]["value"]
    assert row["full"] < row["single"]["value"]


def test_the_record_is_strict_json_and_draws_a_page(record):
    text = studies.to_json(record)
    assert json.loads(text) == record
    assert set(record["results"]) == {*PARTS, "seconds"}
    page = studies.page(json.loads(text))
    assert f"<h1>{record['findings'][0]}</h1>" in page
    assert len(re.findall(r'<svg class="figure"', page)) == len(PARTS)
    for sentence in record["findings"]:
        assert sentence.endswith(".")


def test_progress_ends_where_it_announced(record):
    assert {part: (n, n) for part, n in pieces(Plan.tiny()).items()} == CALLS


def test_steps_with_both_batches_the_same_are_conjugate_gradients_of_it():
    ((_, problem),) = states("digits-tanh", (0.0,), 0)
    plan = Plan.tiny()
    ((first, second),) = pairs(problem, 32, 1, 0)
    assert not set(map(tuple, first[0].tolist())) & set(map(tuple, second[0].tolist()))
    found = proposals(problem, first, first, plan)
    for rule in ("debiased", "folds"):
        torch.testing.assert_close(found[rule], found["single"])
    torch.testing.assert_close(found["double"][:1], found["single"][:1], rtol=1e-2, atol=1e-3)


def test_the_decrease_is_that_of_the_loss_on_all_data():
    ((_, problem),) = states("digits-tanh", (0.0,), 0)
    step = 0.1 * torch.randn(1, 610, generator=torch.Generator().manual_seed(0))
    (found,) = decreases(problem, step, 0.5)
    before = problems.evaluate(problem, problem.train)[0]
    parameters = list(problem.model.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(start + step[0], parameters)
    after = problems.evaluate(problem, problem.train)[0]
    decay = 0.25 * (start.square().sum() - (start + step[0]).square().sum())
    assert found.item() == pytest.approx(before - after + decay.item(), abs=1e-5)


def test_on_trained_digits_debiased_steps_beat_those_of_the_same_batch():
    """Not those of the doubled batch: nothing is asserted about them."""
    plan = replace(Plan.tiny(), step_sizes=(128, 512), step_repeats=15)
    for row in steps(plan, 0, lambda: None)["rows"]:
        difference = row["debiased_minus_single"]
        assert difference["mean"][1] > 2 * difference["standard_error"][1]


def test_iterates_are_partial_sums():
    class Flat:
        def along(self, rows):
            return -torch.ones(len(rows)), torch.full((len(rows),), 3.0)

    found = iterates(Flat(), torch.eye(3), damping=1.0)
    assert found.tolist() == [[0.25, 0, 0], [0.25, 0.25, 0], [0.25, 0.25, 0.25]]


def test_evaluations_meet_all_the_wanted_steps():
    assert evaluations([0, 300], 300) == 1
    assert evaluations([30, 300], 300) == 10
    count = evaluations([0, 4, 400], 400)
    assert {0, 4, 400} <= {round(400 * i / count) for i in range(count + 1)}


def test_words_call_a_small_difference_none():
    entry = {"value": 1.1, "standard_error": 0.1}
    assert reading.deviations(entry, 1) == pytest.approx(1)
    assert reading.deviations({"value": 1.1, "standard_error": None}, 1) == 0
    row = {"width": 1, "depth": 3, "batch_size": 8, "same": {"top": entry}}
    rows = [
        {**row, "parameters": 10},
        {**row, "parameters": 20, "same": {"top": {"value": 2.0, "standard_error": 0.1}}},
    ]
    (sentence,) = reading.grid({"grid": {"rows": rows}})
    assert "the bias grows with the network" in sentence
    rows[1]["same"] = {"top": {"value": 1.2, "standard_error": 0.1}}
    assert "within two standard errors" in reading.grid({"grid": {"rows": rows}})[0]
    assert math.isclose(reading.score({"mean": [0, 2.0], "standard_error": [1, 0.5]}, 1), 4)
