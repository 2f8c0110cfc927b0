"""`pb.noise.measures`, the loggers, `paraboloid inspect` and `paraboloid noise` say the same of the same samples."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import paraboloid as pb
from paraboloid import cli, noise
from paraboloid.jobs.inspection import NOISE_ONLY, Plan, inspect
from paraboloid.jobs.inspection.noise import gradient_noise
from paraboloid.jobs.inspection.subject import subject
from paraboloid.problems import Problem, Training
from paraboloid.report import render, to_json
from paraboloid.report.numbers import UNDEFINED, number

PROBLEMS = "from noise.test_one_definition import told, untold"
SETTINGS = Training("sgd", 0.1, batch_size=8, epochs=0)


def told():
    """A net before its training: 60 samples agree on where to go."""
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    xy = x, (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))
    return Problem(model, nn.CrossEntropyLoss(), xy, xy, name="tiny", training=SETTINGS)


def untold():
    """The gradients of a single weight are +-2, and cancel."""
    xy = torch.ones(60, 1), torch.tensor([1.0, -1.0]).repeat(30)[:, None]
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Problem(model, nn.MSELoss(), xy, xy, name="coin", training=SETTINGS)


def logged(problem):
    stats = pb.statistics(problem.model, problem.loss_fn, problem.train[:], ["grad", "variance"])

    class Board:
        def __init__(self):
            self.found = {}

        def add_scalar(self, tag, value, step):
            self.found[tag.removeprefix("paraboloid/")] = value

    board = Board()
    pb.logging.TensorBoard(board).write(stats, 0)
    assert str(board.found) == str(pb.logging.scalars(stats))  # NaN is not equal to itself
    return {tag.removeprefix("noise_to_signal").lstrip("/"): value for tag, value in board.found.items()
            if tag.startswith("noise_to_signal")}  # fmt: skip


@pytest.fixture
def written(tmp_path, monkeypatch):
    """name of a problem -> (record, what was printed) of `paraboloid noise`."""
    (tmp_path / "made.py").write_text(PROBLEMS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def run(name):
        result = CliRunner().invoke(cli.main, ["noise", f"made:{name}", "--quick", "--draws", "2", "--out", "out"])
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8")), result.output

    return run


def test_all_doors_agree_to_the_last_digit(written):
    tiny = told()
    expected = noise.measures(tiny.model, tiny.loss_fn, tiny.train[:])
    scales = {name: layer.noise_scale for name, layer in expected.layers.items()} | {"": expected.total.noise_scale}
    assert all(scale > 0 for scale in scales.values()) and set(scales) == {"0", "2", ""}
    assert logged(tiny) == scales

    plan = Plan.quick(batch_sizes=(8,), draws=2, repeats=3)
    records = [inspect(tiny, plan), inspect(told(), plan, stages=NOISE_ONLY), written("told")[0]]
    for record in records:
        (point,) = record["noise"]["checkpoints"]
        rows = {row["name"]: row for row in point["layers"]} | {"": point["total"]}
        assert {name: row["noise_scale"] for name, row in rows.items()} == scales
        assert {name: row["noise_to_signal"] for name, row in rows.items()} == {k: v / 8 for k, v in scales.items()}
        assert rows[""]["signal"] == expected.total.signal
        assert rows["0"]["average_variance"] == expected.layers["0"].variance * (1 / 8 - 1 / 60)
        page = render(record)
        digits = number(scales[""])
        assert f"<dd>{digits}<small>noise equals signal" in page  # the tile, the table and the sentence
        assert f"<td>{digits}</td>" in page and f"equal in batches of {digits} samples" in page


def test_a_signal_that_is_not_positive_is_said_through_all_doors(written):
    coin = untold()
    expected = noise.measures(coin.model, coin.loss_fn, coin.train[:])
    assert expected.total.signal < 0 and expected.total.noise_scale is None
    assert expected.to_json()["total"]["noise_scale"] is None
    assert math.isnan(logged(coin)[""])

    record, printed = written("untold")
    (point,) = record["noise"]["checkpoints"]
    for row in (*point["layers"], point["total"]):
        assert row["noise_scale"] is None and row["noise_to_signal"] is None
        assert row["signal"] == expected.total.signal
    assert "the mean gradient cannot be told from its noise" in printed
    plan = Plan.quick(batch_sizes=(8,), draws=2, repeats=3)
    for found in (record, inspect(coin, plan)):
        page = render(json.loads(to_json(found)))
        assert f"<dd>{UNDEFINED}<small>the signal is within its noise" in page
        assert "the mean gradient cannot be told from its noise" in page


def test_comparing_estimators_converges_to_the_numbers_of_the_page():
    tiny = told()
    exact = gradient_noise(subject(tiny, 100, 0), 8, lambda: None)["total"]
    found = noise.compare(tiny.model, tiny.loss_fn, tiny.train, 8, ["sgb"], draws=400, reference="full")["sgb"]
    for name in ("average_variance", "normalized_variance"):
        error = getattr(found, f"{name}_error")
        assert abs(getattr(found, name) - exact[name]) < 3 * error < 0.2 * exact[name]
