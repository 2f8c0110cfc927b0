"""One table of losses: name -> (loss module, draw targets for an output of the given shape)."""

import torch
from oracle import Times
from torch import nn


def classes(ignore=False):
    def draw(f):
        y = torch.randint(f.shape[1], (f.shape[0], *f.shape[2:]))
        if ignore:
            y.view(-1)[0] = -100
        return y

    return draw


def soft(f):
    return torch.rand(f.shape).softmax(1).to(f)


def real(f):
    return torch.randn(f.shape).to(f)


def unit(f):
    return torch.rand(f.shape).to(f)


def counts(f):
    return torch.randint(4, f.shape).to(f)


def weights(f):
    return torch.linspace(0.5, 2, f.shape[1]).to(f)


LOSSES = {
    "ce": (lambda f: nn.CrossEntropyLoss(), classes()),
    "ce sum": (lambda f: nn.CrossEntropyLoss(reduction="sum"), classes()),
    "ce weights, ignored, smoothed": (
        lambda f: nn.CrossEntropyLoss(weights(f), ignore_index=-100, label_smoothing=0.1), classes(ignore=True)
    ),
    "ce ignored sum": (lambda f: nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2), classes(ignore=True)),
    "ce soft": (lambda f: nn.CrossEntropyLoss(weights(f)), soft),
    "mse": (lambda f: nn.MSELoss(), real),
    "mse sum": (lambda f: nn.MSELoss(reduction="sum"), real),
    "bce": (lambda f: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.5).to(f)), unit),
    "bce sum": (lambda f: nn.BCEWithLogitsLoss(weight=torch.tensor(0.7).to(f), reduction="sum"), unit),
    "poisson": (lambda f: nn.PoissonNLLLoss(full=True), counts),
}  # fmt: skip


def make(name, f, seed=1):
    build, draw = LOSSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(f), draw(f.detach())


__all__ = ["LOSSES", "Times", "make"]
