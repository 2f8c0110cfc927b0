"""A user's own loss: a class with `sample_losses` alone, or with what it knows in closed form."""

import oracle
import pytest
import torch
from torch import nn

import paraboloid as pb


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LearnedVariance(pb.Loss):
    """A Gaussian whose output is the mean and the log variance of each target, written from its log-likelihood."""

    psd = "clip"

    def sample_losses(self, f, y):
        m, s = f.chunk(2, 1)
        return ((y - m).square() * (-s).exp() + s).flatten(1).sum(1) / 2

    def sample_targets(self, f, generator):
        m, s = f.chunk(2, 1)
        return m + (s / 2).exp() * torch.randn(m.shape, generator=generator, dtype=f.dtype)


class Dice(pb.Loss):
    """One minus the soft Dice overlap of each image's mask; not convex in the logits."""

    def __init__(self, psd="raise", smooth=1.0, reduction="mean"):
        self.psd, self.smooth, self.reduction = psd, smooth, reduction

    def sample_losses(self, f, y):
        p, y = f.sigmoid().flatten(1), y.flatten(1)
        return 1 - (2 * (p * y).sum(1) + self.smooth) / (p.sum(1) + y.sum(1) + self.smooth)


def segmenter():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 1, 3, padding=1)).double()


def images():
    return draw(3, 1, 3, 4), (draw(3, 1, 3, 4, seed=1) > 0).double()


def clipped(H):
    values, vectors = torch.linalg.eigh(H)
    return vectors @ (values.clamp(min=0).unsqueeze(-1) * vectors.mT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_first_order_quantities_need_no_convexity(reduction):
    model, (x, y) = segmenter(), images()
    loss = Dice(reduction=reduction)
    stats = pb.statistics(model, loss, (x, y), ["grad", "sample_grads", "square_norms"])
    each = [torch.autograd.grad(l, model[0].weight, retain_graph=True)[0] for l in loss.sample_losses(model(x), y)]
    torch.testing.assert_close(stats["sample_grads"]["0.weight"], torch.stack(each), rtol=1e-10, atol=1e-14)
    expected = torch.autograd.grad(loss(model(x), y), model[0].weight)[0]
    torch.testing.assert_close(stats["grad"]["0.weight"], expected, rtol=1e-10, atol=1e-14)


def test_a_root_of_an_indefinite_hessian_is_refused_or_clipped():
    model, (x, y) = segmenter(), images()
    with pytest.raises(
        ValueError, match=r"has the eigenvalue -.*; expected a loss that is convex .* Set psd = 'clip' on Dice"
    ):
        pb.statistics(model, Dice(), (x, y), "diag_ggn")
    f = model(x)
    J = oracle.jacobians(f, {"w": model[0].weight})["w"].flatten(2)
    H = oracle.output_hessians(_Torch(Dice()), f, y)
    assert torch.linalg.eigvalsh(H).min() < -1e-4
    expected = torch.einsum("nop,nor,nrp->p", J, clipped(H), J) / len(x)
    stats = pb.statistics(model, Dice("clip"), (x, y), "diag_ggn")
    torch.testing.assert_close(stats["diag_ggn"]["0.weight"].flatten(), expected, rtol=1e-9, atol=1e-13)
    G = pb.GGN(model, Dice("clip"), (x, y)).to_dense()
    torch.testing.assert_close(G.diagonal()[: expected.numel()], expected, rtol=1e-9, atol=1e-13)
    assert torch.linalg.eigvalsh(G).min() > -1e-10


class _Torch(nn.Module):
    """A user's loss as the oracle of torch modules takes it."""

    reduction = "mean"

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, f, y):
        return self.loss.sample_losses(f, y)


def test_the_exact_hessian_of_dice():
    model, (x, y) = segmenter(), images()
    dense = pb.Hessian(model, Dice(), (x, y)).to_dense()
    params = list(model.parameters())
    g = torch.autograd.grad(Dice()(model(x), y), params, create_graph=True)
    flat = torch.cat([t.flatten() for t in g])
    expected = torch.stack(
        [torch.cat([t.flatten() for t in torch.autograd.grad(e, params, retain_graph=True)]) for e in flat]
    )
    torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-13)


def test_sampled_labels_come_from_one_method():
    """Fisher by sample_targets; its mean is the Fisher information, here also that of the built-in Gaussian."""
    f, y = draw(1, 4), draw(1, 2, seed=1)
    ours, built_in = LearnedVariance(), pb.losses.GaussianNLL(log_variance=True)
    draws = 4000
    rows = torch.stack(list(ours.sampled_gradients(f, y, draws, torch.Generator().manual_seed(0))))[:, 0] * draws**0.5
    products = rows.unsqueeze(2) * rows.unsqueeze(1)
    expected = built_in.curvature_product(f, y, torch.eye(4).double().unsqueeze(1))[:, 0]
    assert ((products.mean(0) - expected).abs() <= 5 * products.std(0) / draws**0.5).all()
    model, x = nn.Linear(3, 4).double(), draw(5, 3)
    kron = pb.statistics(model, ours, (x, draw(5, 2)), ["kfac", "diag_ggn_mc"])["kfac"]["weight"]
    assert kron.left.shape == (4, 4)


def test_the_gaussian_agrees_with_the_built_in_one():
    f, y = draw(4, 6), draw(4, 3, seed=1)
    ours, built_in = LearnedVariance(), pb.losses.GaussianNLL(log_variance=True, reduction="batchmean")
    torch.testing.assert_close(ours(f, y), built_in(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.gradient(f, y), built_in.gradient(f, y), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(ours.hessian_product(f, y, f), built_in.hessian_product(f, y, f), rtol=1e-10, atol=1e-14)


def test_without_labels_to_sample_the_error_says_what_is_missing():
    model, (x, y) = segmenter(), images()
    with pytest.raises(
        NotImplementedError, match=r"Dice does not say how to draw labels .* expected a `sample_targets` method"
    ):
        pb.statistics(model, Dice("clip"), (x, y), "kfac")


class Coupled(pb.Loss):
    def sample_losses(self, f, y):
        return (f - y).square().flatten(1).sum(1) / len(f)


class Scalar(pb.Loss):
    def sample_losses(self, f, y):
        return (f - y).square().sum()


@pytest.mark.parametrize(
    "loss, message",
    [
        (Coupled(), r"Coupled: the loss of sample 0 is .* in the batch and .* alone; expected a loss that separates"),
        (
            Scalar(),
            r"Scalar.sample_losses returned shape \(\) for outputs \(5, 4\); expected one number per sample, \[5\]",
        ),
    ],
)
def test_samples_that_are_not_separate_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        pb.statistics(nn.Linear(3, 4).double(), loss, (draw(5, 3), draw(5, 4)), "grad")


def test_sample_losses_are_needed():
    with pytest.raises(NotImplementedError, match="Loss has no `sample_losses`"):
        pb.Loss()(draw(2, 2), draw(2, 2))


def test_psd_is_one_of_two():
    with pytest.raises(ValueError, match=r"Dice.psd is 'abs'; expected 'raise' or 'clip'"):
        Dice("abs").hessian_root(draw(2, 1, 2, 2), draw(2, 1, 2, 2).sigmoid())
