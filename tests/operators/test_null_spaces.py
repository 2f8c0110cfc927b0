"""Eigenvalues that other data measures do not depend on which basis of a null space a decomposition returned."""

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.linalg import kronecker
from paraboloid.linalg.eigenform import decomposed

F64 = torch.float64
CE = nn.CrossEntropyLoss()


@pytest.fixture
def turned(monkeypatch):
    """turned(seed): decompositions return other bases of null spaces from now on."""

    def turn(seed):
        generator = torch.Generator().manual_seed(seed)

        def other_basis(matrix, what):
            values, vectors = decomposed(matrix, what)
            vectors = vectors.clone()
            for value, U in zip(values, vectors, strict=True):
                null = value <= 1e-12 * value.max()
                n = int(null.sum())
                Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q
                U[:, null] = U[:, null] @ Q
            return values, vectors

        monkeypatch.setattr(kronecker, "decomposed", other_basis)

    return turn


def problem(N=6, seed=0):
    """Six features of which three samples see three, and hidden units that are dead."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(F64)
    model[0].bias.data[:2] = -100
    return model, torch.randn(N, 6, dtype=F64), torch.randint(3, (N,))


@pytest.mark.parametrize("make", [
    lambda m, a, b: pb.KFAC(m, CE, a, measure_on=b).to_dense(),
    lambda m, a, b: pb.KFAC(m, CE, a, measure_on=b, fisher="exact").to_dense(),
    lambda m, a, b: pb.EKFAC(m, CE, a, measure_on=b).to_dense(),
    lambda m, a, b: pb.laplace(m, CE, b, "kron", debias=True).functional(b[0])[1],
    lambda m, a, b: pb.laplace(m, CE, b, "ekfac", debias=True).functional(b[0])[1],
], ids=["kfac", "kflr", "ekfac", "laplace kron", "laplace ekfac"])  # fmt: skip
def test_measured_eigenvalues(make, turned):
    model, x, y = problem()
    first, second = (x[:3], y[:3]), (x, y)
    want = make(model, first, second)
    for seed in range(2):
        turned(seed)
        torch.testing.assert_close(make(model, first, second), want, rtol=1e-9, atol=1e-12)


def test_what_is_measured_in_a_null_space_keeps_its_trace():
    model, x, y = problem()
    K = pb.KFAC(model, CE, (x[:3], y[:3]), fisher="exact", measure_on=(x, y))
    whole = pb.KFAC(model, CE, (x, y), fisher="exact")
    assert abs(K.trace() - whole.trace()) < 1e-12 * whole.trace()


@pytest.mark.parametrize("kind", [pb.optim.KFAC, pb.optim.EKFAC])
def test_steps_of_halves(kind, turned):
    found = []
    for seed in range(3):
        if seed:
            turned(seed)
        model, x, y = problem()
        opt = kind(model, CE, lr=0.1, damping=0.1, measure_on="half", inverse_interval=2, factor_interval=1, seed=0)
        for _ in range(5):
            opt.zero_grad()
            CE(model(x), y).backward()
            opt.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-10)
