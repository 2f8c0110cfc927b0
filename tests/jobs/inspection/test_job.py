import dataclasses
import html
import json

import pytest
import torch
from torch import nn

from paraboloid.jobs.inspection import Plan, inspect
from paraboloid.jobs.inspection.job import STAGES, checkpoint_steps
from paraboloid.jobs.inspection.plan import batch_sizes, fitted, forward_operations
from paraboloid.problems import Problem, Training
from paraboloid.report import KEYS, render, to_json

TINY = Plan.quick(batch_sizes=(4, 8), repeats=2, directions=2, checkpoints=3)


def problem(samples=24, **changes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    settings = {"training": Training("sgd", lr=0.1, batch_size=6, epochs=3, weight_decay=1e-3), "name": "tiny"}
    loss = changes.pop("loss", nn.CrossEntropyLoss())
    return Problem(changes.pop("model", model), loss, (x, y), (x, y), **{**settings, **changes})


@pytest.fixture(scope="module")
def record():
    return inspect(problem(), TINY)


def test_the_record_is_strict_json_with_the_five_sections_and_draws_a_page(record):
    assert list(record) == list(KEYS)
    text = to_json(record)
    assert json.loads(text) == record
    assert "<h1>" in render(json.loads(text))


def test_the_record_says_what_was_done(record):
    training = record["training"]
    assert (training["optimizer"], training["steps"], training["epochs"]) == ("SGD", 12, 3)
    assert [point["step"] for point in training["curve"]] == list(range(13))
    checkpoints = record["noise"]["checkpoints"]
    assert [point["step"] for point in checkpoints] == [0, 1, 12]
    assert [row["batch_size"] for row in record["bias"]["table"]] == [4, 6, 8]
    assert record["curvature"]["weight_decay"] == 1e-3
    assert record["problem"]["command"] == "paraboloid inspect tiny --seed 0 --quick --batch-sizes 4,8"
    assert record["problem"]["notes"] == []
    assert set(record["problem"]["seconds"]) == set(STAGES)
    assert [layer["name"] for layer in record["problem"]["layers"]] == ["0", "2"]
    for name in STAGES:
        assert all(sentence.endswith(".") for sentence in record[name]["reading"])


def test_the_top_eigenvalue_bounds_the_curvature_of_all_data(record):
    top = record["curvature"]["eigenvalues"][0]["value"]
    for row in record["bias"]["table"]:
        assert row["curvature"]["full"]["mean"][0] <= top * (1 + 1e-4)


def without_seconds(record):
    return {**record, "problem": {**record["problem"], "seconds": None}}


def test_the_same_seed_gives_the_same_record_and_torch_keeps_its_random_state(record):
    before = torch.get_rng_state()
    again = inspect(problem(), TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert without_seconds(again) == without_seconds(record)


def test_progress_ends_where_it_announced():
    calls = {}
    inspect(problem(), TINY, progress=lambda stage, done, total: calls.setdefault(stage, []).append((done, total)))
    assert list(calls) == list(STAGES)
    for stage, seen in calls.items():
        assert seen[-1][0] == seen[-1][1], stage
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_model_ends_trained_and_in_evaluation_mode(record):
    p = problem()
    again = inspect(p, TINY)
    assert not p.model.training
    with torch.no_grad():
        loss = nn.functional.cross_entropy(p.model(p.train.tensors[0]), p.train.tensors[1]).item()
    assert loss == pytest.approx(again["training"]["curve"][-1]["train_loss"], rel=1e-6)


def test_a_model_that_is_trained_already_is_measured_as_it_is():
    record = inspect(problem(training=Training(epochs=0, batch_size=6)), TINY)
    assert record["training"]["steps"] == 0
    assert record["training"]["reading"] == ["The model was measured as it was given; it was not trained here."]
    assert len(record["noise"]["checkpoints"]) == 1
    assert "Figure 1" in render(record)


def test_regression_has_no_accuracy():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
    p = Problem(
        model, nn.MSELoss(), (x, x[:, :1]), (x, x[:, :1]), name="line", training=Training(batch_size=6, epochs=1)
    )
    record = inspect(p, TINY)
    assert record["training"]["curve"][-1]["test_accuracy"] is None
    assert "Accuracy" not in render(record)


def test_a_warning_becomes_a_note(recwarn):
    class Unruly(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return torch.einsum("ni,i->ni", self.linear(x), self.scale)

    record = inspect(problem(model=Unruly()), TINY)
    (note,) = record["problem"]["notes"]
    assert "scale" in note
    assert len(recwarn) == 0
    assert html.escape(note) in render(record).replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


def test_sizes_without_two_disjoint_batches_are_dropped():
    assert batch_sizes(problem(40), Plan(batch_sizes=(8, 16, 32))) == ([6, 8, 16], [32])
    assert batch_sizes(problem(40), Plan(batch_sizes=(8, 16), samples=16)) == ([6, 8], [16])


def test_too_little_data_is_an_error_that_names_the_way_out():
    with pytest.raises(ValueError, match=r"^11 training samples are too few.*of 6, .*need 12.*--batch-sizes 2"):
        inspect(problem(11), Plan(batch_sizes=(16,)))


@pytest.mark.parametrize(
    "evaluated, count, expected",
    [
        (list(range(61)), 8, {0, 1, 2, 4, 8, 15, 30, 60}),
        (list(range(0, 41, 2)), 4, {0, 2, 8, 40}),
        ([0, 5], 8, {0, 5}),
        ([0], 8, {0}),
        ([0, 1, 2], 1, {2}),
    ],
)
def test_checkpoints_are_spaced_geometrically(evaluated, count, expected):
    assert checkpoint_steps(evaluated, count) == expected


class Coupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_what_cannot_be_measured_is_said_before_the_training(monkeypatch):
    def train(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr("paraboloid.problems.train", train)
    with pytest.raises(ValueError, match="reduction='sum'"):
        inspect(problem(loss=nn.CrossEntropyLoss(reduction="sum")), TINY)
    with pytest.raises(ValueError, match="one that paraboloid knows"):
        inspect(problem(loss=lambda f, y: nn.functional.cross_entropy(f, y)), TINY)
    coupled = Coupled()
    with pytest.raises(ValueError, match=r"BatchNorm|batch_norm|samples"):
        inspect(problem(model=coupled), TINY)
    assert coupled.training


def test_operations_of_a_forward_pass():
    convolution = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Flatten())  # 2 outputs at 2 positions
    assert forward_operations(problem(model=convolution)) == 2 * 2 * 2 * 2
    assert forward_operations(problem()) == 2 * 26  # at least two for each parameter


def test_a_small_model_keeps_its_plan():
    plan, steps = fitted(Plan(), problem(1000))
    assert (plan.samples, plan.repeats, plan.density_samples) == (1000, 15, 5)
    assert steps == 501


def test_a_large_model_is_measured_on_less():
    plan, steps = fitted(Plan(budget=1e7, training_budget=1e3), problem(1000))
    assert (plan.samples, plan.repeats, plan.density_samples) == (250, 3, 1)
    assert steps == 10
    assert batch_sizes(problem(1000), plan) == ([6, 32, 64], [128, 256, 512])


def test_the_quick_plan_does_less():
    full, quick = Plan(), Plan.quick()
    for field in ("evaluations", "checkpoints", "directions", "density_samples", "density_steps", "repeats", "samples"):
        assert getattr(quick, field) < getattr(full, field)
    assert Plan.quick(samples=10).samples == 10


@pytest.mark.parametrize("kind", ["hessian", "kfac", "ekfac"])
def test_other_curvatures_draw_a_page_and_are_in_the_command(kind):
    record = inspect(problem(), dataclasses.replace(TINY, curvature=kind))
    assert record["problem"]["command"].endswith(f"--quick --curvature {kind} --batch-sizes 4,8")
    text = to_json(record)
    page = render(json.loads(text))
    name = record["curvature"]["operator"]
    assert f"Spectral density of the {name}" in page
    assert f"largest eigenvalues of the {name}" in page
    assert all(sentence.endswith(".") for sentence in record["curvature"]["reading"])
    if kind == "hessian":
        assert record["curvature"]["reading"][0].startswith("The largest of 26 eigenvalues of the Hessian is ")
        assert "eigenvalues per unit (log scale)" in page


def test_an_unknown_curvature_is_refused_before_the_training():
    with pytest.raises(ValueError, match="curvature is 'fisher'; expected one of"):
        inspect(problem(), dataclasses.replace(TINY, curvature="fisher"))
