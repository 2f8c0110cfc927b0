"""The Gaussian's likelihood against torch's own, with the variance as its third argument."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.losses import GaussianNLL, Loss

N = 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def torchs(full=False, eps=1e-6, reduction="mean", log_variance=False):
    """Torch's loss of an output that carries the variance behind the mean."""
    module = nn.GaussianNLLLoss(full=full, eps=eps, reduction=reduction)

    def loss(f, y):
        y = y if y.dim() == f.dim() else y.unsqueeze(1)
        m, v = f[:, : y.shape[1]], f[:, y.shape[1] :]
        v = v.exp() if log_variance else v
        return module(m, y, v.expand_as(m))  # torch's own broadcasting takes some shapes for others

    return loss


def hessian(fn, f, y):
    f = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(fn(f, y), f, create_graph=True)
    return torch.stack([torch.autograd.grad(e, f, retain_graph=True)[0].reshape(-1) for e in g.reshape(-1)])


def positive(f, size):
    return torch.cat([f[:, :size], f[:, size:].abs() + 0.1], 1)


CASES = {  # output, targets
    "each its own": (positive(draw(N, 6), 3), draw(N, 3, seed=1)),
    "shared": (positive(draw(N, 4), 3), draw(N, 3, seed=1)),
    "without a channel axis": (positive(draw(N, 2), 1), draw(N, seed=1)),
    "pixels": (positive(draw(N, 4, 2, 3), 2), draw(N, 2, 2, 3, seed=1)),
    "shared pixels": (positive(draw(N, 3, 2, 2), 2), draw(N, 2, 2, 2, seed=1)),
    "below eps": (draw(N, 4).abs() * torch.tensor([1, 1, 1, 1e-3]).double(), draw(N, 2, seed=1)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_value_gradient_and_exact_hessian_are_torchs(case, log_variance, reduction):
    f, y = CASES[case]
    eps = 0.05 if case == "below eps" else 1e-6
    if log_variance and case != "below eps":
        f = f * draw(*f.shape, seed=3).sign()
    reference = torchs(True, eps, reduction, log_variance)
    loss = GaussianNLL(full=True, eps=eps, reduction=reduction, log_variance=log_variance)
    loss.check(f, y)
    a = 1 / loss.normalizer(f, y)
    leaf = f.clone().requires_grad_()
    torch.testing.assert_close(loss(f, y), reference(f, y), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        a * loss.gradient(f, y), torch.autograd.grad(reference(leaf, y), leaf)[0], rtol=1e-10, atol=1e-14
    )
    H = hessian(reference, f, y)
    u = draw(2, *f.shape, seed=9)
    product = a * loss.hessian_product(f, y, u).flatten(1)
    torch.testing.assert_close(product, u.flatten(1) @ H, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("log_variance", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_curvature_is_the_mean_hessian_over_labels_of_the_model(case, log_variance):
    """E over y ~ N(m, v) of the exact Hessian, by Gauss-Hermite nodes: exact for the quadratic in y that it is."""
    f, y = CASES[case]
    loss = GaussianNLL(reduction="sum", log_variance=log_variance, eps=1e-9)
    m, v = f[:, : y[:, None].shape[1] if y.dim() < f.dim() else y.shape[1]], None
    v = f[:, m.shape[1] :].exp() if log_variance else f[:, m.shape[1] :]
    u = draw(*f.shape, seed=2)
    nodes = [-(3**0.5), 0.0, 3**0.5]
    weights = [1 / 6, 2 / 3, 1 / 6]
    # H depends on y through r and r^2, element by element, so one node for all elements at a time is enough
    expected = sum(
        w * loss.hessian_product(f, (m + z * v.sqrt()).view(y.shape), u) for z, w in zip(nodes, weights, strict=True)
    )
    torch.testing.assert_close(loss.curvature_product(f, y, u), expected, rtol=1e-10, atol=1e-12)
    root = torch.stack(list(loss.hessian_root(f, y)))
    assert len(root) == loss.root_columns(f)
    rebuilt = (root * (root * u).flatten(2).sum(2).view(len(root), N, *[1] * (f.dim() - 1))).sum(0)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-10, atol=1e-12)


def test_sampled_gradients_estimate_the_curvature():
    f, y = positive(draw(1, 4), 3), draw(1, 3, seed=1)
    for loss in (GaussianNLL(), GaussianNLL(log_variance=True), GaussianNLL(variance=0.3)):
        out = f[:, :3] if loss.variance is not None else f
        draws = 8000
        rows = torch.stack(list(loss.sampled_gradients(out, y, draws, torch.Generator().manual_seed(0)))) * draws**0.5
        products = rows[:, 0].unsqueeze(2) * rows[:, 0].unsqueeze(1)
        expected = torch.stack(list(loss.hessian_root(out, y)))[:, 0]
        expected = expected.T @ expected
        assert ((products.mean(0) - expected).abs() <= 5 * products.std(0) / draws**0.5 + 1e-12).all()


@pytest.mark.parametrize("variance", [0.3, torch.tensor([0.5, 1.5, 3.0]), draw(N, 1).exp()])
def test_a_given_variance(variance):
    f, y = draw(N, 3), draw(N, 3, seed=1)
    loss = GaussianNLL(variance)
    loss.check(f, y)
    v = torch.as_tensor(variance, dtype=f.dtype).expand_as(f)

    def reference(f, y):
        return nn.functional.gaussian_nll_loss(f, y, v)

    a = 1 / loss.normalizer(f, y)
    leaf = f.clone().requires_grad_()
    torch.testing.assert_close(loss(f, y), reference(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        a * loss.gradient(f, y), torch.autograd.grad(reference(leaf, y), leaf)[0], rtol=1e-10, atol=0
    )
    H = hessian(reference, f, y)
    for product in (loss.hessian_product, loss.curvature_product):
        torch.testing.assert_close(a * product(f, y, f).flatten(), H @ f.flatten(), rtol=1e-10, atol=1e-14)


def test_from_torch_reads_mean_and_variance_from_axis_1():
    torch.manual_seed(0)
    body = nn.Linear(3, 4).double()

    class Heteroscedastic(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            m, s = self.body(x).chunk(2, 1)
            return torch.cat([m, nn.functional.softplus(s)], 1)

    model, x, y = Heteroscedastic(), draw(5, 3), draw(5, 2, seed=1)
    module = nn.GaussianNLLLoss(full=True, eps=1e-4, reduction="sum")
    loss = Loss.from_torch(module)
    assert (loss.full, loss.eps, loss.reduction) == (True, 1e-4, "sum")
    stats = pb.statistics(model, module, (x, y), ["grad", "diag_ggn"])
    m, v = model(x).chunk(2, 1)
    expected = torch.autograd.grad(module(m, y, v), body.weight)[0]
    torch.testing.assert_close(stats["grad"]["body.weight"], expected, rtol=1e-10, atol=0)
    assert (stats["diag_ggn"]["body.weight"] >= 0).all()
    G = pb.GGN(model, module, (x, y))
    diagonal = torch.cat([stats["diag_ggn"][k].flatten() for k in stats["diag_ggn"]])
    torch.testing.assert_close(G.to_dense().diagonal(), diagonal, rtol=1e-10, atol=0)
    assert torch.linalg.eigvalsh(G.to_dense()).min() > -1e-12
    dense = pb.Hessian(model, module, (x, y)).to_dense()
    assert torch.linalg.eigvalsh(dense).min() < -1e-3  # the exact Hessian is another matrix


F = positive(draw(N, 4), 2)
ERRORS = [
    (GaussianNLL(), F[:, :2], draw(N, 2), r"needs outputs \[N, 2 C, ...\] .* found \(4, 2\) for \(4, 2\)"),
    (GaussianNLL(), F, draw(N, 2).long(), "needs floating-point targets; found torch.int64"),
    (GaussianNLL(), draw(N, 4), draw(N, 2), "found the variance -.* behind the mean"),
    (GaussianNLL(1.0), F, draw(N, 2), r"with a given variance needs targets of the output's shape \(4, 4\)"),
    (GaussianNLL(torch.ones(3)), F, F, r"variance has shape \(3,\), which does not broadcast to the output \(4, 4\)"),
    (GaussianNLL(), F, draw(3, 2), "the output has 4 samples but the targets have shape"),
]  # fmt: skip


@pytest.mark.parametrize("loss, f, y, message", ERRORS, ids=[e[3][:30] for e in ERRORS])
def test_what_does_not_fit(loss, f, y, message):
    with pytest.raises(ValueError, match=message):
        loss.check(f, y)


def test_a_given_variance_is_positive():
    with pytest.raises(ValueError, match="variance is -1; expected positive numbers"):
        GaussianNLL(-1)
