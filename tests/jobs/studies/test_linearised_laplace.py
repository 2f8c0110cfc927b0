"""The linearised-Laplace study: its claims follow from its rows, and the page from its record."""

import json
from dataclasses import replace

import pytest

from paraboloid.jobs import studies
from paraboloid.jobs.studies.linearised_laplace import Plan, pieces
from paraboloid.jobs.studies.linearised_laplace.growth import methods, weights
from paraboloid.jobs.studies.linearised_laplace.reading import claims

TINY = Plan(
    networks=(4,),
    epochs=(2, 6),
    structures=("full", "kron"),
    train=60,
    test=50,
    seeds=1,
    factors=(10.0,),
    em_steps=2,
    samples=8,
    growing=((5, 1),),
)


@pytest.fixture(scope="module")
def record():
    ticks = []
    found = studies.reproduce("linearised-laplace", plan=TINY, progress=lambda *tick: ticks.append(tick))
    assert {part: done for part, done, _ in ticks} == pieces(TINY)
    return found


def test_the_page_and_the_record(record):
    assert json.loads(studies.to_json(record)) == record
    page = studies.page(record)
    assert page == studies.page(json.loads(studies.to_json(record)))
    for claim, seen, measured in claims(record["results"]):
        assert seen in (True, False)
        assert measured.split(",")[0].replace("'", "&#39;") in page, claim
    assert "Rescaled weights" in page


def test_rows(record):
    rows = record["results"]["evidence"]
    assert len(rows) == 2 * (1 + 2 * 4)  # moments: the network, structures by ways
    own = {row["epochs"]: row for row in rows if row["structure"] == "network"}
    matched = [row for row in rows if row["way"] == "adapted, matched"]
    assert all(abs(row["nll"] - own[row["epochs"]]["nll"]) < 0.3 for row in matched)
    assert all(row["accuracy"] == own[row["epochs"]]["accuracy"] for row in matched)  # the most probable class stays


def test_rescaled_weights(record):
    change = {row["way"]: row["change"] for row in record["results"]["rescaling"]}
    assert change["one precision"] > 1e-3
    assert max(change["by layer"], change["matched"]) < 1e-5


def test_claims_follow_the_numbers(record):
    """Turned around, the rows turn the claims around."""
    results = json.loads(json.dumps(record["results"]))
    first = {claim: seen for claim, seen, _ in claims(results)}
    claim = "Evidence at the trained weights makes the negative log-likelihood worse than the network's"
    for row in results["evidence"]:
        if row["structure"] == "network":
            row["nll"] += 10 if first[claim] else -10
    assert {c: seen for c, seen, _ in claims(results)}[claim] != first[claim]


def test_em_by_samples_follows_the_exact_one(record):
    rows = record["results"]["em"]
    exact, drawn = ([row for row in rows if row["kind"] == kind] for kind in ("exact", "sampled"))
    assert [row["step"] for row in exact] == [row["step"] for row in drawn] == [0, 1, 2]
    assert drawn[0]["precision"] == exact[0]["precision"] == 1.0
    assert abs(drawn[2]["precision"] / exact[2]["precision"] - 1) < 0.3  # eight samples
    assert {row["method"] for row in record["results"]["growth"]} == {
        "network", "last layer", "kron", "sampled", "functional"
    }  # fmt: skip
    assert {row["weights"] for row in record["results"]["growth"]} == {385}


def test_finished_pieces_are_not_run_again(tmp_path):
    plan = replace(TINY, structures=("kron",), em_steps=1, keep=str(tmp_path / "pieces.jsonl"))
    first = studies.reproduce("linearised-laplace", plan=plan)["results"]
    lines = (tmp_path / "pieces.jsonl").read_text().splitlines()
    (tmp_path / "pieces.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # torn
    ticks = []
    again = studies.reproduce("linearised-laplace", plan=plan, progress=lambda *tick: ticks.append(tick))["results"]
    assert {part: done for part, done, _ in ticks} == pieces(plan)
    for part in ("evidence", "rescaling", "em"):
        assert again[part] == first[part]
    assert again["growth"][:-1] == first["growth"][:-1]  # with the seconds that they took
    one, two = again["growth"][-1], first["growth"][-1]
    assert one["seconds"] != two["seconds"] and one["nll"] == two["nll"]


def test_larger_networks_have_fewer_samples():
    """As many numbers at most; the functional posterior where its rows can be kept."""
    plan = Plan.full()
    found = [methods(plan, *each) for each in plan.growing]
    assert [each["sampled"] for each in found] == [32, 32, 32, 4]
    assert ["functional" in each for each in found] == [True, False, False, False]
    assert 9e3 < weights(*plan.growing[0]) < 1.1e4 and 9e6 < weights(*plan.growing[-1]) < 1.1e7
