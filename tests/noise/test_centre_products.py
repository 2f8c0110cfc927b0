"""C_k . g_n, ||g_n||^2 and the sums of a clustering pass, against explicit gradients; every order of contraction."""

import models
import numpy as np
import oracle
import pytest
import torch
from torch import nn

from paraboloid.losses import Loss
from paraboloid.noise.assignment import assign
from paraboloid.noise.centre_products import ORDERS, mean_sides, order, products, sums
from paraboloid.noise.centres import start
from paraboloid.noise.gradients import pull
from paraboloid.reductions.outer import Zero
from paraboloid.reductions.products import Products, Vector, merge

CLOSE = {"rtol": 1e-10, "atol": 1e-13}
K, N = 4, 5
MSE = nn.MSELoss()


def conv(groups=1):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 20, 3))


def case(name, rank=2):
    """parameter -> (its outer products, explicit gradients [N *shape], random centres)."""
    if name.startswith("conv groups"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = conv(int(name[-1])).double(), torch.randn(N, 2, 5, 4, dtype=torch.float64)
    else:
        model, x = models.make(name, N)
    inputs = x if isinstance(x, tuple) else (x,)
    f = model(*inputs)
    y = torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=f.dtype)
    params = dict(model.named_parameters())
    truth = oracle.sample_grads(MSE, f, y, {k: p for k, p in params.items() if p.requires_grad})
    outers = pull(model, Loss.from_torch(MSE), (x, y), 0, None, "auto")
    generator = torch.Generator().manual_seed(2)
    result = {}
    for k, uses in outers.items():
        o = merge(uses)
        if isinstance(o, Zero):
            assert not truth[k].any()
            continue
        result[k] = o, truth[k], start(o.block, K, rank, o.left, generator, params[k].shape, o.flip)
    return result


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", models.MODELS)
def test_products_norms_and_distances_of_every_layer(name, rank):
    for o, g, centres in case(name, rank).values():
        cross, norms, _ = products(o, centres)
        C, flat = centres.dense().flatten(1), g.flatten(1)
        torch.testing.assert_close(cross, flat @ C.T, **CLOSE)
        torch.testing.assert_close(norms, flat.square().sum(1), **CLOSE)
        torch.testing.assert_close(centres.square_norms(), C.square().sum(1), **CLOSE)
        distance = (flat[:, None] - C).square().sum(2)
        torch.testing.assert_close(centres.square_norms() - 2 * cross + norms[:, None], distance, **CLOSE)


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("name", ["conv groups 1", "conv groups 2", "sequence mlp", "unet"])
def test_every_order_of_contraction(name, by):
    for o, g, centres in case(name).values():
        for memory in (None, 1):
            cross, norms, J = products(o, centres, memory, by, keep=10**6)
            if J is not None and not centres.flip:
                torch.testing.assert_close(J.flatten(), g.flatten(), **CLOSE)
            torch.testing.assert_close(cross, g.flatten(1) @ centres.dense().flatten(1).T, **CLOSE)
            torch.testing.assert_close(norms, g.flatten(1).square().sum(1), **CLOSE)


def test_the_cheapest_order_is_taken():
    assert order(T=2, p=100, q=100, columns=10) == "gram"
    assert order(T=784, p=64, q=75, columns=10) == "matrix"


@pytest.mark.parametrize("name", [*models.MODELS, "conv groups 2"])
def test_sums_over_clusters_seen_through_kept_columns(name):
    cluster = torch.tensor([1, 0, 3, 1, 1])
    for o, g, centres in case(name).values():
        G, p, q = centres.block
        J = g.reshape(N, *centres.shape).reshape(N, G, q, p).mT if centres.flip else g.reshape(N, G, p, q)
        total = torch.zeros(K, G, p, q, dtype=g.dtype).index_add_(0, cluster, J)
        if q > 1:
            expected = torch.einsum("kgpq,kgqr->krgp", total, centres.basis("right"))
            torch.testing.assert_close(sums(o, "right", centres.basis("right"), cluster), expected, **CLOSE)
        expected = torch.einsum("kgpq,kgpr->krgq", total, centres.basis("left"))
        torch.testing.assert_close(sums(o, "left", centres.basis("left"), cluster), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "sequence mlp", "conv groups 2", "tagger"])
def test_mean_sides(name):
    cluster = torch.tensor([1, 0, 3, 1, 1])
    for o, _, _ in case(name).values():
        if not isinstance(o, Products | Vector):
            continue
        left, right = mean_sides(o, cluster, K)
        for k in range(K):
            mine = cluster == k
            torch.testing.assert_close(left[k, 0], o.left[0][mine].sum((0, 2)), **CLOSE)
            torch.testing.assert_close(right[k, 0], o.inputs()[mine].mean(2).sum(0)
                                       if isinstance(o, Products) else mine.sum().to(right).expand_as(right[k, 0]), **CLOSE)  # fmt: skip


def test_running_sizes_move_with_every_sample():
    """Equal distances: samples spread evenly; with sizes held fixed, they all join one cluster."""
    equal = torch.ones(7, 3)
    sizes = np.zeros(3)
    assert assign(equal, sizes, "running").tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sizes.tolist() == [3, 2, 2]
    assert assign(equal, np.array([3.0, 2.0, 2.5]), "fixed").tolist() == [1] * 7
    assert assign(torch.tensor([[3.0, 2.0], [1.0, 2.0]]), np.array([9.0, 1.0]), "none").tolist() == [1, 0]
