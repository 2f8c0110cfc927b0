"""Both damping stages, the gate, and the two forms of the inverse, alone."""

import pytest
import torch

from paraboloid.optim.bfgs import (
    DenseInverse,
    LimitedMemoryInverse,
    first_weight,
    is_safe,
    second_weight,
    update_columns,
)
from paraboloid.optim.layer_vectors import LayerVectors

F64 = torch.float64


def vectors(seed=0, p=7):
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(p, p, generator=g, dtype=F64)
    return (*torch.randn(2, p, generator=g, dtype=F64), B @ B.T / p + 0.1 * torch.eye(p, dtype=F64))


def updated(H, s, y):
    """The update as K-BFGS makes it."""
    layers, Hy = LayerVectors([len(s)], s.device), H @ y
    ((U, V),) = update_columns(layers, s, Hy, [float(s @ y)], [float(y @ Hy)])
    return H + U @ V


@pytest.mark.parametrize("seed", range(8))
def test_the_first_damping_reaches_its_bound_exactly(seed):
    s, y, H = vectors(seed)
    theta = first_weight(float(s @ y), float(y @ H @ y))
    bound = 0.2 * y @ H @ y
    if s @ y > bound:
        assert theta == 1
    else:
        torch.testing.assert_close((theta * s + (1 - theta) * (H @ y)) @ y, bound)
        assert 0 <= theta <= 1


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_second_damping_reaches_its_bound_or_is_clipped(seed, mu):
    s, y, _ = vectors(seed)
    theta = second_weight(float(s @ y), float(s @ s), mu)
    assert 0 <= theta <= 1
    if s @ y > mu * s @ s:
        assert theta == 1
    elif mu <= 1:
        torch.testing.assert_close((theta * y + (1 - theta) * s) @ s, mu * s @ s)


def test_zero_steps_stay_zero():
    assert first_weight(0.0, 0.0) == second_weight(0.0, 0.0, 0.3) == 1
    assert not is_safe(0.0, 0.0, 0.0)


def test_the_gate():
    assert is_safe(1.0, 1.0, 1.0)
    assert not is_safe(-1.0, 1.0, 1.0)
    assert not is_safe(1e-5, 1.0, 1.0)
    assert is_safe(1e-5, 1.0, 0.01)
    for bad in (float("nan"), float("inf")):
        assert not is_safe(bad, 1.0, 1.0)
        assert not is_safe(1.0, bad, 1.0)
        assert not is_safe(1.0, 1.0, bad)


def test_inner_products_are_those_of_each_layer_alone():
    g = torch.Generator().manual_seed(0)
    sizes = [3, 1, 5]
    layers = LayerVectors(sizes, torch.device("cpu"))
    a, b = torch.randn(2, 9, generator=g, dtype=F64)
    a[3] = float("nan")  # of the second layer, and of no other
    for found, x, y in zip(layers.dots(torch.stack([a, b])), a.split(sizes), b.split(sizes), strict=True):
        expected = (torch.stack([x, y]) @ torch.stack([x, y]).T).flatten()
        torch.testing.assert_close(torch.tensor(found, dtype=F64), expected, equal_nan=True)
    assert layers.each([2.0, 2.0, 2.0], a) == 2.0
    spread = layers.each([1.0, 2.0, 3.0], a)
    assert torch.equal(spread, torch.tensor([1.0] * 3 + [2.0] + [3.0] * 5, dtype=F64))


def test_an_update_satisfies_the_secant_equation_and_is_the_product_form():
    s, y, H = vectors(3)
    y = y if s @ y > 0 else -y
    found = updated(H, s, y)
    torch.testing.assert_close(found @ y, s)
    rho = 1 / (s @ y)
    V = torch.eye(7, dtype=F64) - rho * torch.outer(s, y)
    torch.testing.assert_close(found, V @ H @ V.T + rho * torch.outer(s, s))
    torch.testing.assert_close(found, found.T)


def test_a_layer_whose_pair_is_no_good_has_no_update():
    s, y, H = vectors(3)
    layers = LayerVectors([4, 3], s.device)
    (_, _), (U, V) = update_columns(layers, s, H @ y, [0.5, 0.0], [1.0, 1.0])
    assert not U.any() and not V.any()


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
        limited.update(s / (s @ y).sqrt(), y / (s @ y).sqrt())
        dense = DenseInverse(7, v)
        for pair in pairs[-memory:]:
            dense.H = updated(dense.H, *pair)
        torch.testing.assert_close(limited.times(v), dense.times(v), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(limited.times(v[:, 0]), dense.times(v[:, 0]), rtol=1e-8, atol=1e-9)
        assert limited.pairs == min(memory, seed + 1)
        again = LimitedMemoryInverse(7, memory, torch.zeros(1, dtype=F64))
        again.load(limited.state)
        assert torch.equal(again.times(v), limited.times(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_memory_gives_the_last_digit_of_the_one_that_went_on(dtype):
    """Its window lies elsewhere in memory, which products of vectors that begin within a line would tell."""
    for size in (5, 17, 33, 100):
        g = torch.Generator().manual_seed(size)
        like, going = torch.zeros(1, dtype=dtype), LimitedMemoryInverse(size, 20, torch.zeros(1, dtype=dtype))
        loaded = None
        for pair in range(50):
            s, noise = torch.randn(2, size, generator=g, dtype=dtype)
            y = s + 0.1 * noise
            scale = (s @ y) ** -0.5
            for memory in [going] if loaded is None else [going, loaded]:
                memory.update(s * scale, y * scale)
            v = torch.randn(size, 13, generator=g, dtype=dtype)
            if loaded is not None:
                assert torch.equal(going.times(v), loaded.times(v))
                assert torch.equal(going.times(v[:, 0].contiguous()), loaded.times(v[:, 0].contiguous()))
            if pair % 7 == 3:
                loaded = LimitedMemoryInverse(size, 20, like)
                loaded.load({name: t.clone() for name, t in going.state.items()})
