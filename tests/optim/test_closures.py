"""A closure evaluated twice on one batch: the same masks, and no trace of the second call."""

import pytest
import torch
from torch import nn

from paraboloid.optim.closures import Evaluation


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    x = torch.randn(8, 4)

    def closure():
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    return model, closure


@torch.no_grad()
def test_the_second_evaluation_repeats_the_first():
    model, closure = parts()
    first = Evaluation(closure, model, model.parameters())
    after = torch.get_rng_state()
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    assert first.again() == first.value == float(first.loss)
    for p in model.parameters():
        p += 0.1
    assert first.again() != first.value
    assert torch.equal(torch.get_rng_state(), after)
    for p, (grad, value) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is grad and torch.equal(grad, value)
    assert all(torch.equal(b, value) for b, value in zip(model.buffers(), buffers, strict=True))


def test_a_failing_second_evaluation_puts_the_gradients_back():
    model, closure = parts()
    first = Evaluation(closure, model, model.parameters())
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyError), first.replayed():
        model.zero_grad()
        raise KeyError
    assert all(torch.equal(p.grad, value) for p, value in zip(model.parameters(), before, strict=True))


def test_a_closure_without_gradients_and_one_that_returns_a_number():
    model, closure = parts()
    with pytest.raises(RuntimeError, match="the closure left no gradient"):
        Evaluation(lambda: model(torch.ones(2, 4)).sum(), model, model.parameters())
    assert Evaluation(lambda: float(closure().detach()), model, model.parameters()).value > 0
