"""Both damping stages, the gate, and the two forms of the inverse, alone."""

import pytest
import torch

from paraboloid.optim.bfgs import (
    DenseInverse,
    LimitedMemoryInverse,
    damped_change,
    damped_step,
    is_safe,
    update_inverse,
)

F64 = torch.float64


def vectors(seed=0, p=7):
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(p, p, generator=g, dtype=F64)
    return (*torch.randn(2, p, generator=g, dtype=F64), B @ B.T / p + 0.1 * torch.eye(p, dtype=F64))


@pytest.mark.parametrize("seed", range(8))
def test_the_first_damping_reaches_its_bound_exactly(seed):
    s, y, H = vectors(seed)
    found = damped_step(s, y, H @ y)
    bound = 0.2 * y @ H @ y
    if s @ y > bound:
        assert torch.equal(found, s)
    else:
        torch.testing.assert_close(found @ y, bound)
        direction = (found - H @ y) / (s - H @ y)
        torch.testing.assert_close(direction, direction[0].expand_as(direction))
        assert 0 <= direction[0] <= 1


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_second_damping_reaches_its_bound_or_is_clipped(seed, mu):
    s, y, _ = vectors(seed)
    found = damped_change(s, y, mu)
    if s @ y > mu * s @ s:
        assert torch.equal(found, y)
    elif mu <= 1:
        torch.testing.assert_close(found @ s, mu * s @ s)
    else:
        weight = (found - s) / (y - s)
        torch.testing.assert_close(weight, weight[0].expand_as(weight))
        assert 0 <= weight[0] <= 1


def test_zero_steps_stay_zero():
    zero = torch.zeros(7, dtype=F64)
    assert torch.equal(damped_change(zero, zero, 0.3), zero)
    assert torch.equal(damped_step(zero, zero, zero), zero)
    assert not is_safe(zero, zero, zero)


def test_the_gate():
    s, one = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    assert is_safe(s, s, one)
    assert not is_safe(s, -s, one)
    assert not is_safe(s, 1e-5 * s, one)
    assert is_safe(s, 1e-5 * s, 0.01 * one)
    for bad in (float("nan"), float("inf")):
        assert not is_safe(s, bad * s, one)
        assert not is_safe(s, s, bad * one)


def test_an_update_satisfies_the_secant_equation_and_is_the_product_form():
    s, y, H = vectors(3)
    y = y if s @ y > 0 else -y
    found = H.clone()
    update_inverse(found, s, y)
    torch.testing.assert_close(found @ y, s)
    rho = 1 / (s @ y)
    V = torch.eye(7, dtype=F64) - rho * torch.outer(s, y)
    torch.testing.assert_close(found, V @ H @ V.T + rho * torch.outer(s, s))
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_the_compact_form_is_bfgs_from_the_identity_with_the_last_pairs(memory):
    pairs = []
    limited = LimitedMemoryInverse(7, memory, torch.zeros(1, dtype=F64))
    v = torch.randn(7, 4, generator=torch.Generator().manual_seed(5), dtype=F64)
    assert torch.equal(limited.times(v), v)
    for seed in range(6):
        s, y, _ = vectors(seed)
        y = y if s @ y > 0 else -y
        pairs.append((s, y))
        limited.update(s, y)
        dense = DenseInverse(7, v)
        for pair in pairs[-memory:]:
            dense.update(*pair)
        torch.testing.assert_close(limited.times(v), dense.times(v), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(limited.times(v[:, 0]), dense.times(v[:, 0]), rtol=1e-8, atol=1e-9)
        assert limited.S.shape == (7, min(memory, seed + 1))
