"""Inducing inputs: exact with all inputs of the data, the closed form with few."""

import pytest
import torch
from gp.test_conditioning import KERNEL, NEW, NOISE, data, exact

import paraboloid as pb


def test_all_inputs_as_inducing_ones_are_exact():
    x, y = data(150)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, samples=2, inducing=x)
    mean, covariance = exact(KERNEL, x, y, NEW)
    torch.testing.assert_close(gp.mean(NEW), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gp.variance(NEW), covariance.diagonal(), rtol=1e-5, atol=1e-6)
    assert gp.solver == "inducing"


@pytest.mark.parametrize("noise", [NOISE, torch.linspace(0.05, 0.3, 400, dtype=torch.float64)], ids=["one", "each"])
def test_few_inducing_inputs_are_the_projected_process(noise):
    x, y = data(400)
    Z = x[:30]
    gp = pb.gp.condition(KERNEL, x, y, noise, samples=2000, inducing=Z, features=512)
    D = torch.as_tensor(noise).expand(400).double()
    KZ, KZZ, kZ = KERNEL(Z, x), KERNEL(Z), KERNEL(NEW, Z)
    S = KZZ + (KZ / D) @ KZ.T
    torch.testing.assert_close(gp.mean(NEW), kZ @ torch.linalg.solve(S, (KZ / D) @ y), rtol=1e-4, atol=1e-5)
    least = (
        KERNEL.diagonal(NEW)
        - (kZ * torch.linalg.solve(KZZ, kZ.T).T).sum(1)
        + (kZ * torch.linalg.solve(S, kZ.T).T).sum(1)
    )
    torch.testing.assert_close(gp.variance(NEW), least, rtol=1e-4, atol=1e-5)
    assert gp.sample(NEW).shape == (2000, 60) and gp.weights.shape == (30, 1)


def test_the_data_chooses_them():
    x, y = data(500)
    gp = pb.gp.condition(KERNEL, x, y, NOISE, samples=0, inducing=100)
    mean, _ = exact(KERNEL, x, y, NEW)
    assert (gp.mean(NEW) - mean).norm() < 0.1 * mean.norm()
    assert "100 inducing inputs" in gp.reason
    with pytest.raises(ValueError, match="expected solver='auto'"):
        pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", inducing=10)
    with pytest.raises(ValueError, match="takes no more data"):
        gp.append(x, y)
