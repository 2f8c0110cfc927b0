"""The study of Gaussian processes in miniature: its page, its record, UCI folders, and what is robust."""

import json

import numpy as np
import pytest

from paraboloid.jobs import studies
from paraboloid.jobs.studies import gp
from paraboloid.jobs.studies.gp import Plan, gpytorch_models, pieces, reading, regression

CALLS: dict[str, tuple[int, int]] = {}


@pytest.fixture(scope="module")
def record():
    return studies.reproduce(
        "gp", plan=Plan.tiny(), progress=lambda part, done, total: CALLS.update({part: (done, total)})
    )


def test_solvers_converge_in_their_order(record):
    results = record["results"]
    for system in ("well conditioned", "ill conditioned"):
        ends = {
            s: reading.at_end(results, system, s)["interpolation"] for s in ("cg", "block", "sdd", "sgd, as published")
        }
        assert ends["block"] < ends["sdd"] < ends["sgd, as published"]
        assert reading.at_end(results, system, "sdd")["prior"] < 1e-2


def test_solvers_predict_alike(record):
    rows = {r["method"]: r for r in record["results"]["regression"]}
    assert abs(rows["paraboloid, cg"]["nll"] - rows["paraboloid, cholesky"]["nll"]) < 0.03
    assert abs(rows["paraboloid, cholesky"]["rmse"] - rows["scikit-learn"]["rmse"]) < 0.02
    assert all(0.85 < r["coverage"] <= 1 for r in rows.values())


def test_the_record_is_strict_json_and_draws_a_page(record):
    assert json.loads(studies.to_json(record)) == record
    assert {part: (total, total) for part, total in pieces(Plan.tiny()).items()} == CALLS
    page = studies.page(json.loads(studies.to_json(record)))
    assert page.count('<svg class="figure"') == 3
    table = page.split('<table class="sentences">')[1].split("</table>")[0]  # whose cells wrap
    assert all(claim.split(" (")[0].replace("'", "&#39;") in table for claim, *_ in reading.claims(record["results"]))


def test_likelihoods_that_are_alike_are_not_called_better(record):
    results = json.loads(studies.to_json(record))["results"]

    def seen(difference):
        for row in results["regression"]:
            row["nll"] = 1.0 + difference * (row["method"] == "paraboloid, 100 inducing")
        (found,) = [s for claim, s, _ in reading.claims(results) if "inducing inputs" in claim]
        return found

    assert [seen(0.009), seen(0.011), seen(-1.0)] == [False, True, False]


def test_the_count_comes_first(record):
    assert "findings on Gaussian processes were seen here" in record["findings"][0]
    without = gpytorch_models.MISSING in record["findings"]
    assert without != gpytorch_models.installed()
    assert len(record["findings"]) == len(reading.claims(record["results"])) + 1 + without


def test_uci_sets_in_the_papers_splits(tmp_path):
    with pytest.raises(ValueError, match="holds no UCI set"):
        gp.with_data(Plan(), str(tmp_path))
    rng = np.random.default_rng(0)
    place = tmp_path / "song" / "data"
    place.mkdir(parents=True)
    table = rng.standard_normal((40, 4))
    np.savetxt(place / "data.txt", table)
    np.savetxt(place / "index_features.txt", [0, 1, 3])
    np.savetxt(place / "index_target.txt", [2])
    for k in range(2):
        order = rng.permutation(40)
        np.savetxt(place / f"index_train_{k}.txt", order[4:])
        np.savetxt(place / f"index_test_{k}.txt", order[:4])
    plan = gp.with_data(Plan.tiny(), str(tmp_path))
    assert plan.sets == ("song",)
    splits = list(regression.uci(plan.data, "song", 5))
    assert len(splits) == 2
    np.testing.assert_allclose(splits[1][2], table[order[:4]][:, [0, 1, 3]])
    np.testing.assert_allclose(splits[1][1], table[order[4:], 2])
    rows = regression.regress(plan, 0, lambda: None)
    assert {r["set"] for r in rows} == {"song"} and all(np.isfinite(r["nll"]) for r in rows)
    np.savetxt(place / "index_test_0.txt", [40])
    with pytest.raises(ValueError, match="split 0 of song names row 40 of 40"):
        next(regression.uci(plan.data, "song", 1))
    (place / "index_target.txt").unlink()
    with pytest.raises(ValueError, match=r"index_target\.txt is missing; a UCI set has"):
        next(regression.uci(plan.data, "song", 1))


def test_each_iterative_solver_is_judged_by_its_own_likelihood():
    rows = {f"paraboloid, {m}": {"nll": nll} for m, nll in
            [("cholesky", -0.168), ("cg", -0.167), ("sdd", 1.499), ("100 inducing", -0.166)]}  # fmt: skip
    found = {claim: seen for claim, seen, _ in reading._of_predictions(rows)}
    assert found["conjugate gradients predict as a Cholesky factor does"]
    assert not found["dual descent does so after 100 passes"]
