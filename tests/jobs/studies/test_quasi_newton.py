"""The quasi-Newton study in miniature: its page, its record, and what is known to be robust."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from paraboloid.jobs import studies
from paraboloid.jobs.studies.comparing import method, runs, summary
from paraboloid.jobs.studies.quasi_newton import METHODS, Plan, available, pieces, with_data
from paraboloid.jobs.studies.quasi_newton.methods import Both
from paraboloid.jobs.studies.quasi_newton.reading import claims
from paraboloid.problems import load

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "quasi-newton", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


@pytest.fixture(scope="module")
def found(record):
    (problem,) = record["results"]["problems"]
    return summary.summaries(problem)


def test_k_bfgs_ends_below_adam_and_sgd(found):
    assert found["K-BFGS"].final < found["Adam"].final < found["SGD-m"].final
    assert found["K-BFGS"].epochs < 4


def test_the_winner_is_the_best_of_its_grid_and_every_method_has_as_many_settings(record):
    (problem,) = record["results"]["problems"]
    for row in problem["methods"]:
        assert len(row["grid"]) == 2
        assert len(row["winner"]) == 1
        best, other = summary.winners(row)
        assert best["setting"] == other["setting"]
        assert best["seed"] != other["seed"]
        assert all(run["failed"] or best["final"] <= run["final"] for run in row["grid"])
        assert best["failed"] or [p["epoch"] for p in best["curve"]] == [0, 1, 2, 3, 4]
    assert {len(m.grid) for m in METHODS.values()} == {9}


def test_the_record_is_strict_json_and_draws_a_page(record):
    assert json.loads(studies.to_json(record)) == record
    page = studies.page(json.loads(studies.to_json(record)))
    assert len(re.findall(r'<svg class="figure"', page)) == 1
    assert "Every setting of every grid" in page
    for sentence in record["findings"]:
        assert sentence.endswith(".")


def test_progress_ends_where_it_announced(record):
    total = pieces(Plan.tiny(), available(Plan.tiny(), load("digits-autoencoder")))
    assert {"digits-autoencoder": (total, total)} == CALLS
    assert "Gauss-Newton" not in available(Plan(small=0), load("digits-autoencoder"))


def test_every_method_takes_a_step():
    problem = load("digits-autoencoder")
    task = runs.Task(problem, 700, 1, 1)
    for name, each in METHODS.items():
        if method.missing(name, each) is None:
            run = runs.train(task, each, each.grid[0], 0)
            assert run["failed"] or run["final"] < run["curve"][0]["train"], name


def test_a_package_that_is_missing_is_named():
    wanted = method.Method("peers", lambda *_: None, (), needs="no_such_package")
    assert method.missing("SOAP", wanted) == (
        "SOAP was left out: it is in no_such_package, which is not installed (pip install --no-deps no_such_package)."
    )
    assert method.missing("Adam", METHODS["Adam"]) is None


def test_two_optimisers_step_as_one():
    model = nn.Linear(3, 2)
    both = Both(torch.optim.SGD([model.weight], 0.1), torch.optim.SGD([model.bias], 0.2))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 3)).sum().backward()
    both.step()
    torch.testing.assert_close([b - p.detach() for p, b in zip(model.parameters(), before, strict=True)],
                               [torch.full((2, 3), 0.1), torch.full((2,), 0.2)])  # fmt: skip
    both.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_run_that_leaves_the_numbers_is_said_to_have_failed():
    task = runs.Task(load("digits-autoencoder"), 100, 1, 4)
    run = runs.train(task, METHODS["SGD-m"], {"lr": 1e9}, 0)
    assert run["failed"]
    assert run["final"] is None
    assert json.dumps(run, allow_nan=False)


def point(epoch, seconds, train):
    return {"epoch": epoch, "seconds": seconds, "train": train, "test": train, "accuracy": None}


def run_of(*losses, pace=1.0, seed=0):
    curve = [point(i, pace * i, v) for i, v in enumerate(losses)]
    return {"setting": {"lr": 0.1}, "seed": seed, "curve": curve, "failed": False, "final": losses[-1],
            "test": losses[-1], "accuracy": None, "seconds": pace * (len(losses) - 1), "steps": 3}  # fmt: skip


def test_times_to_adams_last_loss_are_read_between_points():
    rows = [
        {"name": "Adam", "family": "first order", "grid": [run_of(9, 5, 3)], "winner": [run_of(9, 7, 5, seed=1)]},
        {"name": "K-BFGS", "family": "ours", "grid": [run_of(9, 3, 2, pace=2)], "winner": []},
        {"name": "KFAC", "family": "ours", "grid": [run_of(9, 8, 7)], "winner": []},
    ]  # fmt: skip
    found = summary.summaries({"methods": rows})
    assert (found["Adam"].final, found["Adam"].error) == (4, 1)
    assert found["K-BFGS"].epochs == pytest.approx(5 / 6)
    assert found["K-BFGS"].to_adam == pytest.approx(5 / 6 * 2 / 2)
    assert found["KFAC"].to_adam is None
    said = {claim: seen for claim, seen, _ in claims({"methods": rows})}
    assert said["K-BFGS ends below the first-order methods after the same epochs"]
    assert said["An epoch of K-BFGS takes fewer seconds than one of KFAC"] is False
    assert math.isclose(summary.fastest(found, "ours").to_adam, 5 / 6)


def test_data_of_the_users_own_is_the_papers_problem(tmp_path):
    (problem,) = with_data(Plan.full(), str(tmp_path)).problems
    assert problem[:3] == ("mnist-autoencoder", {"data": str(tmp_path)}, 1000)


def test_finished_trainings_are_not_run_again(tmp_path):
    file = tmp_path / "deep" / "trainings.jsonl"
    plan = replace(Plan.tiny(), methods=("SGD-m",), problems=(("digits-autoencoder", {}, 700, 1),), keep=str(file))
    first = studies.reproduce("quasi-newton", plan=plan)["results"]
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # torn
    again = studies.reproduce("quasi-newton", plan=plan)["results"]
    one, other = ([run for kind in ("grid", "winner") for run in r["problems"][0]["methods"][0][kind]] for r in
                  (first, again))  # fmt: skip
    assert [run["seconds"] for run in one[:-1]] == [run["seconds"] for run in other[:-1]]
    assert one[-1]["final"] == other[-1]["final"]
    assert one[-1]["seconds"] != other[-1]["seconds"]
    assert not studies.keeps("gp")


def test_the_authors_figures_are_judged_on_their_own_problem():
    run = {**run_of(169.0, 169.0, 100.0, 90.0, 80.0, 68.0, 68.0), "setting": {}}
    rows = [{"name": "K-BFGS", "family": "ours", "grid": [run], "winner": []}]
    said = {claim: (seen, words) for claim, seen, words in claims({"name": "mnist-autoencoder", "methods": rows})}
    assert said["K-BFGS's training loss is within 10% of the authors' after 1, 5 epochs"] == (
        True, "169.00 (169.00), 68.00 (68.00)")  # fmt: skip
    assert [seen for claim, seen, _ in claims({"name": "x", "methods": rows}) if "authors" in claim] == [None]
