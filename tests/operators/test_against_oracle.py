"""Every model crossed with every loss, on one batch and on two unequal ones, against dense autograd."""

import pytest
import torch
from losses_table import LOSSES as ALL_LOSSES
from losses_table import make as make_loss
from operators.oracle import LOSSES, MODELS, dense_ggn, dense_hessian, make_inputs, make_model

from paraboloid.operators import GGN, Hessian

DENSE = {GGN: dense_ggn, Hessian: dense_hessian}


def close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * scale)


def check(Operator, model, loss_fn, batches, data):
    expected = DENSE[Operator](model, loss_fn, batches)
    kept = Operator(model, loss_fn, data)
    close(kept.to_dense(), expected)
    close(Operator(model, loss_fn, data, max_memory=0).to_dense(), expected)
    V = torch.randn(len(expected), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    close(kept @ V, expected @ V)
    close(kept @ V[:, 0], expected @ V[:, 0])
    close(kept.quadratic_forms(V.T), (V * (expected @ V)).sum(0))
    close(kept.diagonal(), expected.diagonal())


@pytest.mark.parametrize("Operator", DENSE)
@pytest.mark.parametrize("name", MODELS)
def test_models_on_a_batch_and_on_two(Operator, name):
    model = make_model(name)
    loss_fn, targets = LOSSES["cross-entropy"]
    batches = [(make_inputs(name, n, n), targets(n, n)) for n in (4, 2)]
    check(Operator, model, loss_fn, batches[:1], batches[0])
    check(Operator, model, loss_fn, batches, batches)


@pytest.mark.parametrize("Operator", DENSE)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_on_a_batch_and_on_two(Operator, loss):
    model = make_model("mlp")
    loss_fn, targets = LOSSES[loss]
    batches = [(make_inputs("mlp", n, n), targets(n, n)) for n in (4, 3)]
    check(Operator, model, loss_fn, batches[:1], batches[0])
    check(Operator, model, loss_fn, batches, batches)


@pytest.mark.parametrize("Operator", DENSE)
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_the_table_of_losses(Operator, loss):
    """Those that everything else is tested with."""
    model, xs = make_model("mlp"), [make_inputs("mlp", n, n) for n in (4, 3)]
    loss_fn, y = make_loss(loss, torch.cat([model(x) for x in xs]))
    batches = list(zip(xs, y.split((4, 3)), strict=True))
    check(Operator, model, loss_fn, batches[:1], batches[0])
    check(Operator, model, loss_fn, batches, batches)


@pytest.mark.parametrize("Operator", DENSE)
def test_a_user_function(Operator):
    """Any callable with named_parameters is a model, any differentiable function of output and target a loss."""

    class Function:
        def __init__(self):
            g = torch.Generator().manual_seed(0)
            self.w = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)

        def named_parameters(self):
            return [("w", self.w)]

        def parameters(self):
            return [self.w]

        def __call__(self, x):
            return torch.sin(x @ self.w) * x.sum(1, keepdim=True)

    def coupled(f, y):
        return (f - f.mean(0)).square().sum().sqrt() + (f * y).sum().exp().log1p()

    model, batch = Function(), (make_inputs("mlp", 4, 4), torch.ones(4, 3, dtype=torch.float64))
    check(Operator, model, coupled, [batch], batch)
