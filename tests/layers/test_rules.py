"""Every layer and every option, exact against loops of autograd; finite differences for one case of each family."""

import math

import oracle
import pytest
import torch
from layers.cases import CASES, make
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call

SUM = nn.MSELoss(reduction="sum")


def target(model, inputs):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return torch.randn_like(call(model, inputs))


@pytest.mark.parametrize("n", [3, 2])
@pytest.mark.parametrize("name", CASES)
def test_against_loops_of_autograd(name, n):
    """Sequences have two or three positions, so that with n = 2 or 3 lengths and samples are easily confused."""
    model, inputs = make(name, n)
    y = target(model, inputs)
    f = call(model, inputs)
    params = dict(model.named_parameters())
    wanted = ["grad", "sample_grads", "square_norms", "gram", "second_moment", "variance", "diag_ggn"]
    stats = pb.statistics(model, SUM, (inputs, y), wanted)
    close(stats.output, f.detach())
    g = oracle.sample_grads(SUM, f, y, params)
    diagonal = oracle.sample_diag_ggn(SUM, f, y, params)
    for k in params:
        flat = g[k].flatten(1)
        close(stats["grad"][k], g[k].sum(0), k)
        close(stats["sample_grads"][k], g[k], k)
        close(stats["square_norms"][k], flat.square().sum(1), k)
        close(stats["gram"][k], flat @ flat.T, k)
        close(stats["second_moment"][k], g[k].square().mean(0), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        close(stats["diag_ggn"][k], diagonal[k].sum(0), k)


FAMILIES = [
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding_bag", "embedding_bag, offsets", "rms_norm",
    "group_norm on a sequence", "layer_norm without bias", "instance_norm2d", "instance_norm2d, running statistics",
    "batch_norm3d", "prelu, a slope for each channel", "prelu", "bilinear", "rnn", "lstm", "gru, last state",
    "lstm cell", "attention, everything", "attention, cross", "weight vector", "layer scale by view",
    "slices of one matrix", "joined matrices", "learned query",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_against_finite_differences(name):
    """Every sample's loss along a random direction of every parameter, by central differences."""
    model, inputs = make(name)
    y = target(model, inputs)
    g = pb.statistics(model, SUM, (inputs, y), "sample_grads")["sample_grads"]
    losses = lambda: (call(model, inputs) - y).square().flatten(1).sum(1)  # noqa: E731
    generator = torch.Generator().manual_seed(1)
    for k, p in model.named_parameters():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        h = 1e-5 / float(d.norm())
        with torch.no_grad():
            p += h * d
            above = losses()
            p -= 2 * h * d
            below = losses()
            p += h * d
        slope = (above - below) / (2 * h)
        along = (g[k] * d).flatten(1).sum(1)
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-6 * (1 + float(slope.abs().max())), msg=k)
        assert math.isfinite(float(slope.sum()))
