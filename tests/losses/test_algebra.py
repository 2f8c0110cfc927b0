"""Sums of losses whose reductions differ: every term keeps its own factor, on one batch and on several."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.losses import MSE, BCEWithLogits, CrossEntropy, GaussianNLL, Loss, Sum

N, C = 4, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {
    "mean over N and over N C": (CrossEntropy(), MSE(), lambda f, y: nn.CrossEntropyLoss()(f, y) + nn.MSELoss()(f, y)),
    "mean and sum": (MSE(), BCEWithLogits(reduction="sum"), lambda f, y: nn.MSELoss()(f, y) + nn.BCEWithLogitsLoss(reduction="sum")(f, y)),
    "multiples": (
        3 * CrossEntropy(), 0.5 * MSE(reduction="batchmean"),
        lambda f, y: 3 * nn.CrossEntropyLoss()(f, y) + 0.5 * nn.MSELoss(reduction="sum")(f, y) / len(f),
    ),
    "a multiple of a sum": (2 * (CrossEntropy() + MSE()), BCEWithLogits(), lambda f, y: 2 * nn.CrossEntropyLoss()(f, y) + 2 * nn.MSELoss()(f, y) + nn.BCEWithLogitsLoss()(f, y)),
}  # fmt: skip


def hessian(fn, f, y):
    f = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(f, y), f, create_graph=True)
    return torch.stack([torch.autograd.grad(e, f, retain_graph=True)[0].reshape(-1) for e in g.reshape(-1)])


@pytest.mark.parametrize("pair", PAIRS)
def test_every_term_keeps_its_factor(pair):
    one, other, reference = PAIRS[pair]
    loss, f, y = one + other, draw(N, C), draw(N, C, seed=1).softmax(1)
    loss.check(f, y)
    a = 1 / loss.normalizer(f, y)
    leaf = f.clone().requires_grad_()
    torch.testing.assert_close(loss(f, y), reference(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(a * loss.sample_losses(f, y).sum(), reference(f, y), rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(reference(leaf, y), leaf)[0]
    torch.testing.assert_close(a * loss.gradient(f, y), gradient, rtol=1e-10, atol=1e-14)
    H = hessian(reference, f, y)
    for product in (loss.hessian_product, loss.curvature_product):
        torch.testing.assert_close(a * product(f, y, f).flatten(), H @ f.flatten(), rtol=1e-10, atol=1e-14)
    root = torch.stack(list(loss.hessian_root(f, y)))
    assert len(root) == loss.root_columns(f)
    blocks = a * torch.einsum("vni,vnj->nij", root, root)
    torch.testing.assert_close(torch.block_diag(*blocks), H, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("pair", PAIRS)
def test_sampled_gradients_keep_the_factors_too(pair):
    one, other, reference = PAIRS[pair]
    loss, f, y = one + other, draw(1, C), draw(1, C, seed=1).softmax(1)
    draws = 6000
    rows = torch.stack(list(loss.sampled_gradients(f, y, draws, torch.Generator().manual_seed(0)))) * draws**0.5
    products = rows[:, 0].unsqueeze(2) * rows[:, 0].unsqueeze(1) / loss.normalizer(f, y)
    error = (products.mean(0) - hessian(reference, f, y)).abs()
    assert (error <= 5 * products.std(0) / draws**0.5).all()


def test_what_unreduced_means():
    """Terms that divide alike add up as they are; else the loss is a mean over samples."""
    f, y = draw(N, C), draw(N, C, seed=1).softmax(1)
    alike = MSE() + BCEWithLogits()
    assert alike.normalizer(f, y) == N * C
    torch.testing.assert_close(
        alike.sample_losses(f, y), MSE().sample_losses(f, y) + BCEWithLogits().sample_losses(f, y)
    )
    apart = CrossEntropy() + MSE()
    assert apart.normalizer(f, y) == N
    torch.testing.assert_close(
        apart.sample_losses(f, y), CrossEntropy().sample_losses(f, y) + MSE().sample_losses(f, y) / C
    )
    assert [loss.reduction for loss in (alike, apart, MSE() + MSE("sum"), MSE("sum") + MSE("sum"))] == [
        "mean",
        "mean",
        "mixed",
        "sum",
    ]


@pytest.mark.parametrize("Operator", [pb.GGN, pb.Hessian])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_loader_equals_one_big_batch(pair, Operator):
    torch.manual_seed(0)
    one, other, _ = PAIRS[pair]
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double(), draw(7, 4)
    y = draw(7, C, seed=1).softmax(1)
    whole = Operator(model, one + other, (x, y))
    parts = Operator(model, one + other, [(x[:4], y[:4]), (x[4:], y[4:])])
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)


def test_ignored_targets_make_the_factors_depend_on_the_batch():
    """Two cross-entropies that ignore different classes, over batches in which their shares differ."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)).double(), draw(6, 4)
    y = torch.tensor([0, 1, 1, 2, 0, 0])
    loss = CrossEntropy(ignore_index=0) + 2 * CrossEntropy(ignore_index=1)
    whole = pb.GGN(model, loss, (x, y)).to_dense()
    for cut in (2, 4):  # the last two targets are all ignored by one of the terms
        parts = pb.GGN(model, loss, [(x[:cut], y[:cut]), (x[cut:], y[cut:])]).to_dense()
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_a_sum_of_sums_is_flat_and_checks_every_term():
    loss = (CrossEntropy() + MSE()) + 2 * (MSE() + BCEWithLogits())
    assert len(loss.terms) == 4
    assert isinstance(loss, Sum)
    with pytest.raises(ValueError, match="GaussianNLL with a learned variance needs outputs"):
        (MSE() + GaussianNLL()).check(draw(N, C), draw(N, C))


def test_statistics_of_a_mixed_sum():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, C).double(), draw(N, 4), draw(N, C, seed=1).softmax(1)
    loss: Loss = CrossEntropy() + 0.3 * MSE("sum")
    stats = pb.statistics(model, loss, (x, y), ["grad", "sample_grads", "diag_ggn"])
    torch.testing.assert_close(stats["sample_grads"]["weight"].mean(0), stats["grad"]["weight"])
    diagonal = torch.cat([t.flatten() for t in stats["diag_ggn"].values()])
    torch.testing.assert_close(pb.GGN(model, loss, (x, y)).to_dense().diagonal(), diagonal)
