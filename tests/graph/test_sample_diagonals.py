"""The diagonal of each sample's own Hessian, against double backward passes of each sample's loss."""

import warnings

import losses_table
import models
import oracle
import pytest
import torch
from oracle import close, dense_diagonal, trainable
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.engine.twice_differentiable import twice_differentiable

pytestmark = pytest.mark.filterwarnings("ignore:.*used several times, through other tensors")
SMALL = ["mlp", "residual cnn", "conv1d", "transformer layer", "low rank", "shared"]


@pytest.mark.parametrize("loss_name", ["ce weights, ignored, smoothed", "mse", "bce sum"])
@pytest.mark.parametrize("model_name", SMALL)
def test_each_sample(model_name, loss_name):
    model, inputs = models.make(model_name)
    loss_fn, y = losses_table.make(loss_name, call(model, inputs))
    params = trainable(model)
    found = pb.statistics(model, loss_fn, (inputs, y), ["sample_diag_hessian"])["sample_diag_hessian"]
    with twice_differentiable():
        losses = oracle.unreduced(loss_fn, call(model, inputs), y)
    each = [dense_diagonal(value, params) for value in losses]
    for k, p in params.items():
        assert found[k].shape == (len(losses), *p.shape)
        close(found[k], torch.stack([d[k] for d in each]), k)


@pytest.mark.parametrize("model_name", models.MODELS)
def test_they_add_up(model_name):
    model, inputs = models.make(model_name)
    loss_fn, y = losses_table.make("ce", call(model, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = pb.statistics(model, loss_fn, (inputs, y), ["sample_diag_hessian", "diag_hessian", "sample_diag_ggn"])
    a = oracle.factor(loss_fn, call(model, inputs), y)
    for k, d in stats["diag_hessian"].items():
        close(a * stats["sample_diag_hessian"][k].sum(0), d, k)


class Bent(pb.Loss):
    """Not convex in the output: its root has signs."""

    def sample_losses(self, f, y):
        return (f - y).sin().flatten(1).sum(1)


def test_losses_that_are_not_convex_and_several_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = pb.statistics(model, Bent(), batches, ["sample_diag_hessian"])["sample_diag_hessian"]
    for n in range(7):
        one = dense_diagonal((model(x[n : n + 1]) - y[n : n + 1]).sin().sum(), trainable(model))
        for k, d in one.items():
            close(found[k][n], d, k)
