"""Runs by name: they learn, they resume exactly, and what does not fit is said in one line."""

import json

import pytest
import torch
from click.testing import CliRunner

from paraboloid.cli import main
from paraboloid.jobs.training_run import OPTIMIZERS, Run, Settings, Uniform


def run(out, resume=False, epochs=2, **settings):
    trained = Run(Settings("digits-tanh", epochs=epochs, **settings), out)
    record = trained.go(resume)
    return trained, record


def without_times(record):
    for point in record["metrics"]:
        point.pop("evaluation_seconds")
    record["settings"].pop("epochs")
    assert len(record.pop("step_seconds")) == record["metrics"][-1]["epoch"]
    return record


def flat(trained):
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


FAST = {"lr": 0.05, "batch_size": 256}
CASES = [
    {"optimizer": "sgd", "momentum": 0.9, "batch_size": 256},
    {"optimizer": "adam", **FAST},
    {"optimizer": "kfac", "batch_size": 256},
    {"optimizer": "ekfac", "batch_size": 256},
    {"optimizer": "kbfgsl", "batch_size": 256},
    {"optimizer": "hessian-free", "batch_size": 480},
    {"optimizer": "sgd", "sampler": "gc", "lr": 0.2, "recluster": 50},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda s: f"{s['optimizer']}-{s.get('sampler', 'uniform')}")
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    whole, record = run(tmp_path / "whole", epochs=2, **settings)
    run(tmp_path / "parts", epochs=1, **settings)
    parts, resumed = run(tmp_path / "parts", resume=True, epochs=2, **settings)
    assert torch.equal(flat(whole), flat(parts))
    assert without_times(resumed) == without_times(record)
    assert record["metrics"][-1]["train_loss"] < record["metrics"][0]["train_loss"]
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.pt", "record.json"]
    assert json.loads((tmp_path / "parts" / "record.json").read_text())["metrics"][-1]["epoch"] == 2


def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path):
    settings = {"optimizer": "adam", **FAST}
    whole, _ = run(tmp_path / "whole", epochs=3, **settings)

    def kill(stage, done, total):
        if done == 15:  # in the third epoch of 6 steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(Settings("digits-tanh", epochs=3, **settings), tmp_path / "killed", kill).go()
    parts, record = run(tmp_path / "killed", resume=True, epochs=3, **settings)
    assert torch.equal(flat(whole), flat(parts))
    assert [point["epoch"] for point in record["metrics"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_takes_steps(tmp_path, optimizer):
    _, record = run(tmp_path, epochs=1, optimizer=optimizer, batch_size=480)
    assert record["metrics"][1]["train_loss"] < record["metrics"][0]["train_loss"]


def test_an_epoch_shows_every_sample_once():
    batches = Uniform(10, 4, seed=3)
    seen = torch.cat([batches.next() for _ in range(len(batches))])
    assert sorted(seen.tolist()) == list(range(10)) and batches.epoch == 1
    assert len(Uniform(9, 4, seed=3)) == 2  # no batch of one


def test_what_does_not_fit(tmp_path):
    for settings, message in [
        ({"optimizer": "lion"}, "optimizer is 'lion'; expected one of sgd, adam"),
        ({"sampler": "random"}, "sampler is 'random'; expected one of uniform, gc"),
        ({"optimizer": "adam", "damping": 1.0}, "damping is 1.0 with adam; only"),
        ({"optimizer": "adam", "momentum": 0.5}, "momentum is 0.5 with adam; only"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"epochs": -1}, "epochs is -1; expected at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings("digits-tanh", **settings)
    with pytest.raises(ValueError, match="to resume from; expected the directory of a run"):
        run(tmp_path, resume=True)
    run(tmp_path, epochs=1, **FAST)
    with pytest.raises(
        ValueError, match=r"is of another run: lr is 0.05 there and 0.1 here; expected the same settings"
    ):
        run(tmp_path, resume=True, lr=0.1, batch_size=256)
    with pytest.raises(ValueError, match="sampler 'gc' weights the samples, which hessian-free does not know"):
        run(tmp_path / "hf", optimizer="hessian-free", sampler="gc")
    with pytest.raises(FloatingPointError, match=r"at step \d+: the loss is .* Lower the learning rate"):
        run(tmp_path / "far", optimizer="sgd", lr=1e30, batch_size=256)


def test_the_command(tmp_path):
    out = tmp_path / "run"
    command = ["train", "digits-tanh", "--optimizer", "kfac", "--epochs", "1", "--batch-size", "256", "--out", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "epoch 1: train loss" in done.output and done.output.strip().endswith("record.json")
    again = CliRunner().invoke(main, [*command[:5], "2", *command[6:], "--resume", "--quiet"])
    assert again.exit_code == 0, again.output
    wrong = CliRunner().invoke(main, ["train", "digits-tanh", "--optimizer", "lion", "--out", str(out)])
    assert wrong.exit_code == 1 and "optimizer is 'lion'" in wrong.output
