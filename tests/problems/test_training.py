"""Training: what the curve holds, what is left untouched, and what stops it."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from paraboloid import losses, problems
from paraboloid.passes.random_state import seeded
from paraboloid.problems import Problem, Training

SEED = torch.Generator().manual_seed(0)
X = torch.randn(70, 3, generator=SEED)
Y = X[:, :2].argmax(1)


def small(loss_fn=None, train=(X, Y), test=(X[:20], Y[:20]), model=None, **settings):
    with seeded(0):
        model = model if model is not None else nn.Linear(3, 2)
    settings = {"batch_size": 32, "epochs": 2, **settings}
    return Problem(model, loss_fn or nn.CrossEntropyLoss(), train, test, training=Training(**settings))


def test_digits_are_learnt():
    problem = problems.load("digits-mlp")
    curve = problems.train(problem, epochs=5)
    assert curve[0]["train_loss"] > 2.2
    assert curve[-1]["train_loss"] < 1.0
    assert curve[-1]["test_accuracy"] > 0.8
    assert list(curve[-1]) == ["step", "epoch", "train_loss", "test_loss", "test_accuracy"]
    assert [curve[-1]["step"], curve[-1]["epoch"]] == [5 * 23, 5.0]
    assert len(curve) == 11


def test_autoencoders_have_no_accuracy():
    curve = problems.train(problems.load("digits-autoencoder"), steps=3, evaluations=1)
    assert [point["step"] for point in curve] == [0, 3]
    assert curve[-1]["test_accuracy"] is None


def test_sequences_have_accuracy_per_position():
    problem = problems.load("sequence-transformer", samples=40)
    curve = problems.train(problem, steps=1, evaluations=1)
    x, y = problem.test.tensors
    assert math.isclose(curve[-1]["test_accuracy"], (problem.model(x).argmax(1) == y).double().mean().item())


def test_every_sample_once_per_epoch_and_no_batch_of_one():
    counts = []

    class Counting(Dataset):
        def __len__(self):
            return 65

        def __getitem__(self, i):
            counts.append(i)
            return X[i], Y[i]

    problem = small(train=Counting())
    assert problems.step_count(problem) == 2 * 2
    problems.train(problem, evaluations=1)
    trained = counts[65:-65]  # the evaluations read everything first and last
    assert len(trained) == 2 * 64
    assert len(set(trained[:64])) == len(set(trained[64:])) == 64
    assert trained[:64] != trained[64:]


def test_training_is_deterministic_and_leaves_global_state_alone():
    state = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        problem = small(model=nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)))
        problem.model.load_state_dict({"1.weight": torch.ones(2, 3), "1.bias": torch.zeros(2)})
        before = torch.get_rng_state()
        problems.train(problem, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(problem.model[1].weight.detach().clone())
    torch.set_rng_state(state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_model_is_left_evaluating_without_gradients():
    problem = small(model=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    modes = []
    problems.train(problem, callback=lambda step, model, point: modes.append((step, model.training)))
    assert not problem.model.training
    assert not any(training for _, training in modes)
    assert all(p.grad is None for p in problem.model.parameters())
    assert problem.model[0].num_batches_tracked == 6


def test_the_callback_sees_every_point():
    seen = []
    curve = problems.train(small(), callback=lambda step, model, point: seen.append(point))
    assert seen == curve


def test_weight_decay_is_half_beta_norm_squared():
    """One SGD step on one full batch is theta - lr (gradient + beta theta)."""
    problem = small(optimizer="sgd", lr=0.5, batch_size=70, steps=1, weight_decay=0.1)
    w = problem.model.weight.detach().clone().requires_grad_()
    b = problem.model.bias.detach().clone().requires_grad_()
    loss = nn.functional.cross_entropy(X @ w.T + b, Y) + 0.05 * (w.square().sum() + b.square().sum())
    gradients = torch.autograd.grad(loss, (w, b))
    problems.train(problem)
    assert torch.allclose(problem.model.weight, w - 0.5 * gradients[0])
    assert torch.allclose(problem.model.bias, b - 0.5 * gradients[1])


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0])),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        2 * losses.CrossEntropy(),
        lambda f, y: nn.functional.cross_entropy(f, y),
    ],
)
def test_a_set_is_evaluated_as_one_batch(loss_fn, monkeypatch):
    monkeypatch.setattr(problems.training, "CHUNK", 32)
    problem = small(loss_fn)
    loss, accuracy = problems.evaluate(problem, problem.train)
    assert math.isclose(loss, loss_fn(problem.model(X), Y).item(), rel_tol=1e-6)
    assert math.isclose(accuracy, (problem.model(X).argmax(1) == Y).double().mean().item())


def test_ignored_targets_do_not_count():
    y = Y.clone()
    y[:60] = -100
    problem = small(train=(X, y))
    loss, accuracy = problems.evaluate(problem, problem.train)
    f = problem.model(X)
    assert math.isclose(loss, nn.functional.cross_entropy(f[60:], Y[60:]).item(), rel_tol=1e-6)
    assert math.isclose(accuracy, (f[60:].argmax(1) == Y[60:]).double().mean().item())


def test_accuracy_can_be_left_out_and_must_make_sense():
    problem = dataclasses.replace(small(), accuracy=False)
    assert problems.evaluate(problem, problem.test)[1] is None
    problem = dataclasses.replace(small(nn.MSELoss(), train=(X, X[:, :2]), test=(X, X[:, :2])), accuracy=True)
    with pytest.raises(ValueError, match=r"accuracy=True needs class indices .* targets of shape \(70, 2\)"):
        problems.train(problem)


def test_no_steps_only_evaluate():
    problem = small(epochs=0)
    before = problem.model.weight.detach().clone()
    assert len(problems.train(problem)) == 1
    assert torch.equal(problem.model.weight, before)


def test_targets_out_of_range(monkeypatch):
    monkeypatch.setattr(problems.training, "CHUNK", 32)
    y = Y.clone()
    y[50] = 7
    with pytest.raises(ValueError, match=r"the train data does not fit: target 7 at index 50 .* 0..1 for 2 outputs"):
        problems.train(small(train=(X, y)))
    with pytest.raises(ValueError, match="the test data does not fit: target 7 at index 50"):
        problems.train(small(test=(X, y)))


def test_lengths_that_differ():
    data = TensorDataset(X, Y)
    problem = small(train=data)
    data.tensors = (X, Y[:50])
    with pytest.raises(ValueError, match=r"inputs have shape \(70, 3\) and the targets \(50,\)"):
        problems.train(problem)
    flattening = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1))
    with pytest.raises(ValueError, match="the output has 140 samples but the targets have shape"):
        problems.train(small(model=flattening))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_is_not_finite(bad):
    x = X.clone()
    x[3] = bad
    with pytest.raises(FloatingPointError, match=r"the train loss is nan at step 0; .* Look for NaN"):
        problems.train(small(train=(x, Y)))
    with pytest.raises(FloatingPointError, match="the test loss is nan at step 0"):
        problems.train(small(test=(x, Y)))


def test_training_that_diverges():
    problem = small(nn.MSELoss(), train=(X, X[:, :2]), test=(X, X[:, :2]), optimizer="sgd", lr=1e6, epochs=40)
    with pytest.raises(FloatingPointError, match=r"is (inf|nan) at step \d+; .* Lower the learning rate \(now 1e\+06"):
        problems.train(problem, evaluations=1)
    assert not problem.model.training


def test_epochs_or_steps():
    with pytest.raises(ValueError, match=r"both epochs \(1\) and steps \(2\)"):
        problems.train(small(), epochs=1, steps=2)
    with pytest.raises(ValueError, match="steps is -1; expected at least 0"):
        problems.step_count(small(), steps=-1)
    assert problems.step_count(small(steps=5)) == 5
    assert problems.step_count(small(steps=5), epochs=1) == 3
