"""Two reports side by side: what is told apart follows from values and errors, and what cannot be compared is refused."""

import copy
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from paraboloid.cli import main
from paraboloid.jobs import comparison
from paraboloid.jobs.comparison.row import Row, standard_error

INSPECTED = json.loads((Path(__file__).parents[1] / "report" / "record.json").read_text(encoding="utf-8"))


def written(folder, record, name="report.json"):
    folder.mkdir()
    (folder / name).write_text(json.dumps(record), encoding="utf-8")
    return folder


def trained(losses, optimizer="adam", step=0.5, problem="digits-mlp"):
    metrics = [
        {"epoch": i, "step": 2 * i, "train_loss": v, "test_loss": v, "train_accuracy": None, "test_accuracy": None}
        for i, v in enumerate(losses)
    ]
    return {"settings": {"problem": problem, "optimizer": optimizer, "lr": None}, "parameters": 10,
            "steps_per_epoch": 2, "metrics": metrics,
            "step_seconds": [[i, step] for i in range(1, len(losses))]}  # fmt: skip


@pytest.mark.parametrize(
    "values, errors, better, told, winner",
    [
        ((1.0, 2.0), (0.3, 0.3), "lower", True, "A"),  # 1 > 2 x .424
        ((1.0, 2.0), (0.4, 0.4), "lower", False, None),  # 1 < 2 x .566
        ((1.0, 2.0), (None, 0.1), "higher", None, "B"),
        ((1.0, 2.0), (0.1, 0.1), None, True, None),
        ((1.0, 1.0), (None, None), "lower", False, None),
        ((None, 1.0), (0.1, 0.1), "lower", None, None),
    ],
)
def test_told_is_two_standard_errors_of_the_difference(values, errors, better, told, winner):
    row = Row("training", "loss", values, errors, better)
    assert (row.told, row.winner) == (told, winner)


def test_the_error_of_a_share():
    assert standard_error(0.9, 100) == pytest.approx(0.03)
    assert standard_error(None, 100) is None


def test_two_inspections(tmp_path):
    other = copy.deepcopy(INSPECTED)
    other["problem"]["seed"] = 1
    other["training"]["curve"][-1] |= {"train_loss": 9.0, "test_accuracy": 0.2}
    a, b = written(tmp_path / "a", INSPECTED), written(tmp_path / "b", other)
    record = comparison.compare(a, b)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["settings"] == {"seed": ["0", "1"]}
    rows = {row["quantity"]: row for row in record["rows"]}
    assert rows["training loss"]["winner"] == "A" and rows["training loss"]["told"] is None
    assert rows["test accuracy"]["winner"] == "A" and rows["test accuracy"]["told"] is True
    size = INSPECTED["problem"]["test_size"]
    assert rows["test accuracy"]["error_b"] == pytest.approx(math.sqrt(0.2 * 0.8 / size))
    assert rows["largest eigenvalue"]["a"] == INSPECTED["curvature"]["eigenvalues"][0]["value"]
    at_64 = next(row for row in INSPECTED["bias"]["table"] if row["batch_size"] == 64)
    ratio = at_64["ratios"][0]["curvature"]["same"]
    bias = rows["curvature on the same batch of 64 over that on all data"]
    assert (bias["a"], bias["error_a"]) == (ratio["value"], ratio["standard_error"])
    assert "A has the better training loss" in " ".join(record["findings"])
    html = comparison.page(record, a, b)
    assert html.count('<svg class="figure"') == 4 and "http://" not in html.replace("http://www.w3.org", "")


def test_an_inspection_beside_a_noise_report_shows_what_both_measured(tmp_path):
    noise = {key: INSPECTED[key] for key in ("problem", "training", "noise")}
    record = comparison.compare(written(tmp_path / "a", INSPECTED), written(tmp_path / "b", noise))
    assert {row["section"] for row in record["rows"]} == {"training", "noise"}


def test_two_runs_and_when_one_reached_what_the_other_ended_with(tmp_path):
    a = written(tmp_path / "a", trained([3.0, 2.0, 1.0]), "record.json")
    b = written(tmp_path / "b", trained([3.0, 0.9, 0.5], "kfac", 1.0), "record.json")
    record = comparison.compare(a, b)
    told = " ".join(record["findings"])
    assert "A and B differ in optimizer (adam; kfac)." in told
    assert "B reached the training loss that A ended with, 1.00, after 1 epoch, A after 2; in seconds of steps" in told
    assert "2.00 against 2.00" in told
    assert {row["quantity"]: row["winner"] for row in record["rows"]}["a step, in ms"] == "A"
    assert 'id="time"' in comparison.page(record, a, b)


def test_losses_of_different_problems_are_not_compared(tmp_path):
    a = written(tmp_path / "a", trained([3.0, 2.0]), "record.json")
    b = written(tmp_path / "b", trained([3.0, 1.0], problem="faces"), "record.json")
    (told,) = comparison.compare(a, b)["findings"]
    assert told == "The problems differ (A: digits-mlp, B: faces): losses are not on one scale."


def test_a_run_that_diverged_and_one_without_times(tmp_path):
    a = written(tmp_path / "a", trained([3.0, None]), "record.json")
    old = trained([3.0, 1.0])
    del old["step_seconds"]
    b = written(tmp_path / "b", old, "record.json")
    record = comparison.compare(a, b)
    assert {row["quantity"] for row in record["rows"]} == {"training loss", "test loss", "lowest test loss", "epochs"}
    assert comparison.page(record, a, b)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p / "none", "there is no .*none; expected a folder"),
        (lambda p: p, "holds neither report.json nor record.json"),
        (lambda p: written(p / "a", {"results": {}, "findings": [], "command": "paraboloid reproduce gp"}), "a study"),
        (lambda p: written(p / "a", [1]), r"holds \['list'\]"),
        (lambda p: written(p / "a", trained([1.0])), "measure nothing in common"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, make, words):
    good = written(tmp_path / "good", INSPECTED)
    with pytest.raises(ValueError, match=words):
        comparison.compare(make(tmp_path), good)


def test_the_command(tmp_path):
    a = written(tmp_path / "a", trained([3.0, 2.0]), "record.json")
    b = written(tmp_path / "b", trained([3.0, 1.0], "kfac"), "record.json")
    found = CliRunner().invoke(main, ["compare", str(a), str(b), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0 and "B has the better training loss" in found.output
    record = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert record["rows"][0]["quantity"] == "training loss"
    assert (tmp_path / "out" / "report.html").exists()
    found = CliRunner().invoke(main, ["compare", str(a), str(tmp_path / "nothing")])
    assert found.exit_code == 1 and found.output.startswith("Error: there is no")
