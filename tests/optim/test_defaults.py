"""Every optimiser as it comes, two epochs on two problems, and with its learning rate times .3 and 3: no run may end in
NaN or above where it began, and with the plain default none is worse than AdamW with its own."""

import math
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

import paraboloid as pb

EPOCHS, SAMPLES = 2, 480
PROBLEMS = {"digits-mlp": 32, "digits-autoencoder": 32}  # and the batch size


def problem_of(name):
    problem = pb.problems.load(name, seed=0)
    assert isinstance(problem.train, TensorDataset)
    x, y = problem.train.tensors
    return problem, x[:SAMPLES], y[:SAMPLES]


def trained(name, make):
    """Training losses before and after."""
    problem, x, y = problem_of(name)
    model, loss_fn = problem.model, problem.loss_fn
    opt = make(model, loss_fn)
    size = 5 * PROBLEMS[name] if isinstance(opt, pb.optim.HessianFree) else PROBLEMS[name]  # made for large batches
    start = loss_fn(model(x), y).item()
    for epoch in range(EPOCHS):
        for rows in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).split(size):

            def closure(rows=rows):
                opt.zero_grad()
                loss = loss_fn(model(x[rows]), y[rows])
                loss.backward()
                return loss

            if isinstance(opt, pb.optim.HessianFree):
                opt.step((x[rows], y[rows]))
            elif isinstance(opt, pb.optim.KBFGS):
                opt.step(closure)
            else:
                closure()
                opt.step()
    return start, loss_fn(model(x), y).item()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", pb.optim.__all__)
def test_an_optimiser_trains_untouched(kind, problem):
    make = getattr(pb.optim, kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was not warmed up")
        start, end = trained(problem, make)
        lr = make(problem_of(problem)[0].model, problem_of(problem)[0].loss_fn).param_groups[0]["lr"]
        ends = [trained(problem, lambda m, loss, f=f: make(m, loss, lr=f * lr))[1] for f in (0.3, 3.0)]
    adam = trained(problem, lambda m, _: torch.optim.AdamW(m.parameters()))[1]
    assert all(math.isfinite(e) and e < start for e in (end, *ends)), (start, end, ends)
    assert end <= adam
