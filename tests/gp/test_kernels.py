"""Kernels: tiles against their own definitions, definitions against scikit-learn, random features against both."""

import pytest
import torch
from sklearn.gaussian_process import kernels as sk

import paraboloid as pb
from paraboloid.gp.gram import Gram

G = torch.Generator().manual_seed(0)
X = torch.randn(70, 3, generator=G, dtype=torch.float64)
Z = torch.randn(45, 3, generator=G, dtype=torch.float64)
ARD = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
TWO = [
    (pb.gp.RBF(0.7, 2.0), 2.0 * sk.RBF(0.7)),
    (pb.gp.RBF(ARD), sk.RBF(ARD.numpy())),
    *((pb.gp.Matern(nu, ARD, 0.5), 0.5 * sk.Matern(ARD.numpy(), nu=nu)) for nu in (0.5, 1.5, 2.5)),
    (pb.gp.RationalQuadratic(0.7, 1.3, 0.5), 0.5 * sk.RationalQuadratic(1.3, 0.7)),
    (pb.gp.RBF(2.0) + 0.3 * pb.gp.Matern(0.5), sk.RBF(2.0) + 0.3 * sk.Matern(nu=0.5)),
    (pb.gp.RBF(2.0) * pb.gp.Matern(2.5, 0.9), sk.RBF(2.0) * sk.Matern(0.9, nu=2.5)),
    ((pb.gp.RBF() + pb.gp.Constant(0.5)) * pb.gp.RBF(3.0), (sk.RBF() + sk.ConstantKernel(0.5)) * sk.RBF(3.0)),
]  # fmt: skip
OURS = [k for k, _ in TWO] + [pb.gp.RBF(dims=[0, 2]) * pb.gp.Matern(1.5, dims=[1])]


@pytest.mark.parametrize("ours, theirs", TWO, ids=[str(k) for k, _ in TWO])
def test_values_are_scikit_learns(ours, theirs):
    torch.testing.assert_close(ours(X, Z), torch.from_numpy(theirs(X.numpy(), Z.numpy())))
    torch.testing.assert_close(ours(X), torch.from_numpy(theirs(X.numpy())))
    torch.testing.assert_close(ours.diagonal(X), ours(X).diagonal())


@pytest.mark.parametrize("kernel", OURS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tiles_are_the_values(kernel, dtype):
    x, z, v = X.to(dtype) + 5, Z.to(dtype) + 5, torch.randn(70, 4, generator=G, dtype=torch.float64).to(dtype)
    tolerance = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    gram, dense = Gram(kernel, x, torch.tensor(0.3, dtype=dtype)), kernel(X + 5) + 0.3 * torch.eye(70, dtype=X.dtype)
    dense, rows = dense.to(dtype), torch.tensor([3, 60, 3, 0])
    torch.testing.assert_close(gram.dense(), dense, **tolerance)
    torch.testing.assert_close(gram.rows(rows, v), dense[rows] @ v, **tolerance)
    torch.testing.assert_close(gram.block(rows, torch.arange(70)), dense[rows], **tolerance)
    torch.testing.assert_close(gram.cross(z, v), kernel(Z + 5, X + 5).to(dtype) @ v, **tolerance)
    torch.testing.assert_close(gram.cross_matrix(z), kernel(Z + 5, X + 5).to(dtype), **tolerance)


@pytest.mark.parametrize("max_memory", [0, 10_000_000, None])
def test_products_use_each_tile_for_both_of_its_places(max_memory):
    x = torch.randn(1300, 2, generator=G, dtype=torch.float64)
    v = torch.randn(1300, 3, generator=G, dtype=torch.float64)
    noise = torch.rand(1300, generator=G, dtype=torch.float64)
    kernel = pb.gp.Matern(2.5)
    gram = Gram(kernel, x, noise, max_memory)
    expected = (kernel(x) + noise.diag()) @ v
    for _ in range(2):
        torch.testing.assert_close(gram @ v, expected)
    torch.testing.assert_close(gram @ v[:, 0], expected[:, 0])
    torch.testing.assert_close(gram.without_noise() @ v, kernel(x) @ v)
    once = sum(min(512, 1300 - i) * min(512, 1300 - j) for i in range(0, 1300, 512) for j in range(0, i + 1, 512))
    if max_memory == 0:
        assert gram.evaluated == 3 * once and not gram.kept
    elif max_memory is None:
        assert gram.evaluated == once


@pytest.mark.parametrize("max_memory", [0, 6_000_000])
def test_threads_with_tiles_of_their_own_make_the_same_products(max_memory, monkeypatch):
    monkeypatch.setattr("paraboloid.gp.gram.workers", lambda entries, device: 3)
    x = torch.randn(1300, 2, generator=G, dtype=torch.float64)
    v = torch.randn(1300, 3, generator=G, dtype=torch.float64)
    kernel, rows = pb.gp.Matern(2.5) + pb.gp.RBF(0.5), torch.randperm(1300, generator=G)[:600]
    gram, expected = Gram(kernel, x, torch.tensor(0.3).double(), max_memory), kernel(x) + 0.3 * torch.eye(1300)
    for _ in range(2):  # the second time from rows that were kept
        torch.testing.assert_close(gram @ v, expected @ v)
    torch.testing.assert_close(gram.rows(rows, v), expected[rows] @ v)
    torch.testing.assert_close(gram.rows(rows[:7], v[:, :1]), expected[rows[:7]] @ v[:, :1])
    torch.testing.assert_close(gram.block(rows), expected[rows])
    torch.testing.assert_close(gram.dense(), expected)
    torch.testing.assert_close(gram.cross(x[:700] + 1, v), kernel(x[:700] + 1, x) @ v)


@pytest.mark.parametrize("kernel", [*OURS, pb.gp.Matern(0.5, 2.0, dims=[1]) + pb.gp.RBF(0.5)], ids=str)
def test_random_features_have_the_kernel_as_their_mean(kernel):
    x, total = X[:12], 0
    for seed in range(20):
        phi = kernel.features(2000, 3, torch.Generator().manual_seed(seed), x)(x).flatten(1)
        total = total + phi @ phi.T / 20
    scale = float(kernel.diagonal(x)[0])
    assert (total - kernel(x)).abs().max() < 0.03 * scale
    assert ((total - kernel(x)) / scale).mean().abs() < 0.01


def test_an_isotropic_kernels_features_are_better_than_independent_ones():
    kernel, x = pb.gp.RBF(), X[:40]
    errors = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        phi = kernel.features(512, 3, g, x)(x).flatten(1)
        omega, phase = torch.randn(3, 512, generator=g, dtype=x.dtype), 6.2832 * torch.rand(512, generator=g)
        plain = (2 / 512) ** 0.5 * torch.cos(x @ omega + phase)
        errors.append([(f @ f.T - kernel(x)).square().mean() for f in (phi, plain)])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours < 0.7 * theirs


def test_tanimoto_is_the_ratio_of_sums_of_minima_and_maxima():
    counts = torch.randint(0, 4, (30, 12), generator=G).double()
    bits = (counts > 1).double()
    for x in (counts, bits):
        x[3] = 0
        x[4] = 0
        low = torch.minimum(x[:, None], x[None]).sum(2)
        high = torch.maximum(x[:, None], x[None]).sum(2)
        expected = torch.where(high > 0, low / high, 1)
        kernel = pb.gp.Tanimoto(2.0)
        torch.testing.assert_close(kernel(x), 2 * expected)
        torch.testing.assert_close(Gram(kernel, x, torch.tensor(0.0, dtype=x.dtype)).dense(), 2 * expected)
        phi = kernel.features(20_000, 12, torch.Generator().manual_seed(0), x)(x).flatten(1)
        assert (phi @ phi.T - 2 * expected).abs().max() < 0.08
    with pytest.raises(ValueError, match="expected counts or fingerprints"):
        pb.gp.Tanimoto()(-bits)


@pytest.mark.parametrize("kernel", OURS, ids=str)
def test_hyperparameters_can_be_replaced_and_differentiated(kernel):
    values = {name: v.to(torch.float64).clone().requires_grad_() for name, v in kernel.hyperparameters().items()}
    assert torch.autograd.gradcheck(
        lambda *v: kernel.replaced(dict(zip(values, v, strict=True)))(X[:5], Z[:4]), list(values.values())
    )
    (gradients) = torch.autograd.grad(kernel.replaced(values)(X[:5]).sum(), list(values.values()), allow_unused=True)
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_wrong_hyperparameters():
    for name, make in (("lengthscale", pb.gp.RBF), ("outputscale", lambda v: pb.gp.RBF(1.0, v))):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is .*; expected a positive number"):
                make(value)
    with pytest.raises(ValueError, match=r"nu is 2; expected 0\.5, 1\.5 or 2\.5"):
        pb.gp.Matern(nu=2)
    with pytest.raises(ValueError, match="lengthscale has 2 entries and the inputs have 3 dimensions"):
        pb.gp.RBF(torch.ones(2))(X)
