"""The built-in problems are what their names promise: shapes, sizes, parameters, and the same for the same seed."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from paraboloid import problems
from paraboloid.problems.curves import draw_curves
from paraboloid.problems.faces import draw_faces
from paraboloid.problems.sequences import draw_sequences
from paraboloid.problems.shapes import CLASSES, draw_shapes

#            name, options, trained parameters, input shape, target shape, output shape, train and test samples
TABLE = [
    ("digits-mlp", {}, 7510, (64,), (), (10,), 1437, 360),
    ("digits-tanh", {}, 610, (64,), (), (10,), 1437, 360),
    ("digits-cnn", {}, 3818, (1, 16, 16), (), (10,), 1437, 360),
    ("digits-autoencoder", {}, 9048, (64,), (64,), (64,), 1437, 360),
    ("curves-autoencoder", {"samples": 40}, 842340, (784,), (784,), (784,), 40, 10),
    ("faces-autoencoder", {"samples": 40}, 7537655, (625,), (625,), (625,), 40, 10),
    ("random-features", {"samples": 50}, 2002, (100,), (), (2,), 50, 50),
    ("shapes-cnn", {"samples": 40}, 895210, (3, 32, 32), (), (10,), 40, 8),
    ("sequence-transformer", {"samples": 40}, 103184, (16,), (15,), (16, 15), 40, 8),
]


def test_the_table_is_complete():
    assert [row[0] for row in TABLE] == problems.names()


@pytest.mark.parametrize("name, options, parameters, x_shape, y_shape, f_shape, train, test", TABLE)
def test_shapes_and_sizes(name, options, parameters, x_shape, y_shape, f_shape, train, test):
    problem = problems.load(name, **options)
    assert problem.name == name
    assert problem.title
    assert problem.description
    assert sum(p.numel() for p in problem.model.parameters() if p.requires_grad) == parameters
    assert (len(problem.train), len(problem.test)) == (train, test)
    x, y = problem.train[:4]
    assert x.shape == (4, *x_shape)
    assert y.shape == (4, *y_shape)
    assert x.dtype == (torch.int64 if name == "sequence-transformer" else torch.float32)
    f = problem.model(x)
    assert f.shape == (4, *f_shape)
    assert torch.isfinite(problem.loss_fn(f, y))


@pytest.mark.parametrize("name, options", [row[:2] for row in TABLE])
def test_the_seed_decides_everything(name, options):
    a, b, c = (problems.load(name, seed=seed, **options) for seed in (1, 1, 2))
    state = a.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in b.model.state_dict().items())
    assert any(not torch.equal(state[k], v) for k, v in c.model.state_dict().items())
    for split in ("train", "test"):
        one, same, other = (getattr(p, split).tensors for p in (a, b, c))
        assert all(torch.equal(s, t) for s, t in zip(one, same, strict=True))
        assert torch.equal(one[0], other[0]) == name.startswith("digits")


def test_the_split_of_the_digits():
    digits, order = load_digits(), np.random.default_rng(0).permutation(1797)
    train, test = (split.tensors for split in (problems.load("digits-mlp").train, problems.load("digits-mlp").test))
    for (x, y), chosen in ((train, order[:1437]), (test, order[1437:])):
        assert np.array_equal(x.numpy(), (digits.data[chosen] / 16).astype(np.float32))
        assert np.array_equal(y.numpy(), digits.target[chosen])


def test_enlarged_digits_keep_their_brightness():
    small, large = (problems.load(name).train.tensors[0] for name in ("digits-mlp", "digits-cnn"))
    assert torch.allclose(large.mean((1, 2, 3)), small.mean(1), atol=0.02)


@pytest.mark.parametrize(
    "name, scale", [("digits-autoencoder", 1.0), ("curves-autoencoder", 1.0), ("faces-autoencoder", 0.5)]
)
def test_autoencoder_losses_sum_over_pixels(name, scale):
    options = {} if name.startswith("digits") else {"samples": 8}
    problem = problems.load(name, **options)
    x, y = problem.train[:4]
    f = problem.model(x)
    loss = torch.nn.functional.binary_cross_entropy_with_logits if scale == 1 else torch.nn.functional.mse_loss
    expected = scale * loss(f, y, reduction="sum") / 4
    assert torch.allclose(problem.loss_fn(f, y), expected)


def test_short_runs_are_smaller():
    assert len(problems.load("sequence-transformer", short=True).train) == 2000
    assert len(problems.load("sequence-transformer", short=True, samples=30).train) == 30
    assert len(problems.load("digits-tanh", short=True).train) == 1437


def test_curves_are_strokes():
    images = draw_curves(50, seed=0)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() < 1
    assert ((images > 0.5).mean((1, 2)) < 0.25).all()
    assert (images.max((1, 2)) > 0.8).all()


def test_faces_are_standardised():
    images = draw_faces(50, seed=0)
    assert images.dtype == np.float32
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-5


def test_shapes_are_balanced_and_visible():
    images, labels = draw_shapes(500, seed=0)
    assert images.min() >= -1
    assert images.max() <= 1
    assert np.bincount(labels, minlength=len(CLASSES)).min() > 25


def test_sequences_are_copied_or_sorted():
    tokens, targets = draw_sequences(200, 7, seed=0)
    copy = tokens[:, 0] == 16
    assert set(tokens[:, 0]) == {16, 17}
    assert np.array_equal(targets[copy], tokens[copy, 1:])
    assert np.array_equal(targets[~copy], np.sort(tokens[~copy, 1:], axis=1))


def test_random_features():
    problem = problems.load("random-features", samples=100, duplicated=0.9, originals=5)
    x, y = problem.train.tensors
    assert torch.equal(x[10:], x[:5].repeat(18, 1))
    assert torch.equal(y[10:], y[:5].repeat(18))
    assert len(torch.unique(x, dim=0)) == 10
    rows = problem.model.features.weight
    assert not rows.requires_grad
    assert torch.allclose(rows.norm(dim=1), torch.ones(1000))
    assert [name for name, p in problem.model.named_parameters() if p.requires_grad] == ["output.weight", "output.bias"]
    assert 0.3 < problem.test.tensors[1].float().mean() < 0.7


def test_options_of_3c3d():
    narrow = problems.load("shapes-cnn", samples=10, width=0.25, depth=5).model
    assert [m.out_channels for m in narrow if isinstance(m, torch.nn.Conv2d)] == [16, 24, 32, 32, 32]
    assert narrow(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("random-features", {"duplicated": 1.0}, "duplicated=1.0 of 1000 samples leaves 0"),
        ("random-features", {"duplicated": 0.5, "originals": 0}, "at least 1 original"),
        ("shapes-cnn", {"samples": 10, "depth": 2}, "depth is 2 and width 1.0; expected a depth of at least 3"),
        ("sequence-transformer", {"samples": 0}, "the train data is empty"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        problems.load(name, **options)
