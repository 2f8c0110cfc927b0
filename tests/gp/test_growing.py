"""Appended data: the same answers as with all of it at once, from a warm start."""

import pytest
import torch
from gp.test_conditioning import KERNEL, NEW, NOISE, data, exact

import paraboloid as pb
from paraboloid.gp.gram import Gram


@pytest.mark.parametrize("solver", ["cholesky", "cg", "block", "sdd"])
def test_the_mean_is_that_of_all_data(solver):
    x, y = data(700)
    gp = pb.gp.condition(KERNEL, x[:600], y[:600], NOISE, solver=solver, samples=3, seed=1)
    more = gp.append(x[600:], y[600:])
    mean, covariance = exact(KERNEL, x, y, NEW)
    assert (more.mean(NEW) - mean).norm() < 1e-3 * mean.norm()
    assert len(gp.x) == 600 and len(more.x) == 700
    moved = (more.sample(NEW) - gp.sample(NEW)).abs().mean()
    assert 0 < moved < 0.5 * covariance.diagonal().sqrt().mean()  # the same functions, given a little more


def test_a_warm_start_saves_iterations():
    x, y = data(1200, d=3)
    kernel = pb.gp.Matern(1.5)
    gp = pb.gp.condition(kernel, x[:1190], y[:1190], 1e-2, solver="cg", samples=4, rank=50)
    warm = gp.append(x[1190:], y[1190:])
    cold = pb.gp.condition(kernel, x, y, 1e-2, solver="cg", samples=4, rank=50)
    assert warm.iterations < 0.8 * cold.iterations
    assert warm.gram.evaluated < cold.gram.evaluated  # tiles were taken over


def test_noise_of_new_data_may_differ():
    x, y = data(300)
    gp = pb.gp.condition(KERNEL, x[:200], y[:200], NOISE, samples=0).append(x[200:], y[200:], 0.5)
    noise = torch.cat([torch.full((200,), NOISE), torch.full((100,), 0.5)]).double()
    mean = KERNEL(NEW, x) @ torch.linalg.solve(KERNEL(x) + noise.diag(), y)
    torch.testing.assert_close(gp.mean(NEW), mean)
    with pytest.raises(ValueError, match="noise_variance of the old data has one entry for each input"):
        gp.append(x[:1], y[:1])
    with pytest.raises(ValueError, match=r"y has shape \(2, 3\); expected \(2,\): as many outputs as before"):
        gp.append(x[:2], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="x has 1 dimensions; expected 2"):
        gp.append(torch.zeros(2), y[:2])


@pytest.mark.parametrize("max_memory", [0, 4_000_000, 10_000_000, None])
def test_products_with_kept_tiles_that_were_taken_over(max_memory):
    x, _ = data(1100)
    old, noise = Gram(KERNEL, x[:900], torch.tensor(NOISE).double(), max_memory), torch.tensor(NOISE).double()
    v = torch.randn(1100, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    old @ v[:900]
    new = Gram(KERNEL, x, noise, max_memory, old.shift)
    new.take_over(old)
    expected = (KERNEL(x) + NOISE * torch.eye(1100)) @ v
    for _ in range(2):
        torch.testing.assert_close(new @ v, expected)
        torch.testing.assert_close((new @ v[:, None])[:, 0], expected)
    assert (new.square is not None) == (max_memory in (10_000_000, None))  # 1100^2 numbers of 8 bytes
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in new.kept.values()}.values())
    assert max_memory is None or held <= max_memory
    assert new.keeps_all == (max_memory != 0 and max_memory != 4_000_000)
