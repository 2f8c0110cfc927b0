"""The page of a training run says what to try next, and why, from the figures of its record."""

import pytest

from paraboloid.jobs.training_page import advice
from paraboloid.jobs.training_run import PAGE, Run, Settings

TRUST = {"rate": 1.0, "overshot": 0, "rose": 0, "taken_back": 0, "why": "no step was shortened", "kept_promise": 0.5}


def point(epoch, train, test, trust=None):
    told = None if trust is None else {"steps": 10 * epoch, "skipped": 0, "trust": {**TRUST, **trust}, "layers": {}}
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": train, "test_loss": test, "train_accuracy": None,
            "test_accuracy": None, "batch_loss": None, "evaluation_seconds": 0.1,
            "diagnostics": told}  # fmt: skip


@pytest.mark.parametrize(
    "points, expected",
    [
        (
            [(1, 2.0, 2.0, {}), (2, 1.0, 1.0, {})],
            ["--lr 0.3 may be faster", "the same command with --resume --epochs 4"],
        ),
        ([(1, 2.0, 2.0, None), (2, 1.0, 1.0, None)], ["still fell from 2.00 to 1.00 since epoch 1"]),
        ([(1, 2.0, 0.5, None), (2, 1.0, 1.0, None)], ["lowest, 0.500, after epoch 1"]),
        ([(1, 1.0, 1.0, None), (2, 4.0, 4.0, None)], ["rose in all: try --lr 0.01"]),
        ([(1, 1.0, 1.0, {}), (2, 0.99, 1.0, {"taken_back": 5, "why": "it rose"})], ["5 of 20 steps", "it rose"]),
        ([(1, 1.0, 1.0, {}), (2, 0.99, 1.0, {})], ["moved by less than 5", "from 1.00 to 0.990", "--lr 0.0333"]),
    ],
)
def test_advice_follows_from_the_figures(points, expected):
    metrics = [point(0, 3.0, 3.0), *(point(*p) for p in points)]
    found = " ".join(advice({"metrics": metrics, "lr": 0.1}))
    for words in expected:
        assert words in found, found


@pytest.mark.parametrize("optimizer", ["adam", "kfac", "kbfgs"])
def test_the_page_of_a_run(tmp_path, optimizer):
    run = Run(Settings("digits-tanh", optimizer, epochs=2), tmp_path)
    record = run.go()
    html = run.write_page().read_text(encoding="utf-8")
    assert (tmp_path / PAGE).exists()
    for words in ("Loss", "ms per step", advice({**record, "lr": 1.0})[0].split(" --")[0][:20]):
        assert words in html
    assert ("Steps that went wrong" in html) == (optimizer != "adam")
    assert "http://" not in html.replace("http://www.w3.org", "")
