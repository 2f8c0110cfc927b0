"""The largest columns of the loss's root: what they leave out is known, positive semi-definite, and small enough."""

import pytest
import torch
from losses_table import LOSSES, make

from paraboloid import losses
from paraboloid.losses.leading_root import largest, of_columns

TOLERANCES = [1e-9, 0.01, 0.2, 0.9]


def hessians(columns, N):
    """sum_v s_v s_v^T of each sample, [N, C, C]."""
    s = torch.stack([c.reshape(N, -1) for c in columns])
    return torch.einsum("vni,vnj->nij", s, s)


def check(loss, f, y, tol):
    every = list(loss.hessian_root(f, y))
    H = hessians(every, len(f))
    found = loss.leading_root(f, y, tol)
    columns = list(found.columns)
    assert len(columns) == found.count <= len(every)
    assert all(c.shape == f.shape and c.dtype == f.dtype for c in columns)
    rest = H - hessians(columns, len(f))
    total = H.diagonal(dim1=1, dim2=2).sum()
    assert torch.isclose(torch.tensor(found.total, dtype=total.dtype), total, rtol=1e-10)
    left = rest.diagonal(dim1=1, dim2=2).sum()
    assert abs(left - found.left) <= 1e-12 * total
    assert found.left <= tol * found.total or found.count == 1
    assert torch.linalg.eigvalsh(rest).min() >= -1e-12 * total
    if (own := found.own) is not None:
        n, k = torch.cartesian_prod(torch.arange(len(f)), torch.arange(len(every) + 1)).T
        each = own.of(n)(k).view(len(f), len(every) + 1, *f.shape[1:])
        assert [int(c.flatten(1).any(1).sum()) for c in each] <= own.counts.tolist()
        rest = H - hessians(each.transpose(0, 1), len(f))
        assert abs(rest.diagonal(dim1=1, dim2=2).sum() - own.left) <= 1e-12 * total
        assert own.left <= tol * found.total and int(own.counts.sum()) <= found.count * len(f)
        assert torch.linalg.eigvalsh(rest).min() >= -1e-12 * total
    return found


@pytest.mark.parametrize("tol", TOLERANCES)
@pytest.mark.parametrize("name", LOSSES)
def test_of_every_loss(name, tol):
    f = 2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module, y = make(name, f)
    check(losses.Loss.from_torch(module), f, y, tol)


@pytest.mark.parametrize("shape", [(6, 40), (3, 7, 4), (2, 5, 2, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"label_smoothing": 0.2}, {"weights": True}], ids=str)
def test_cross_entropy_keeps_each_samples_own_classes(shape, options):
    generator = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    options = dict(options)
    if options.pop("weights", False):
        options["weight"] = torch.rand(shape[1], generator=generator, dtype=torch.float64)
    loss = losses.CrossEntropy(**options)
    counts = [check(loss, f, y, tol).count for tol in TOLERANCES]
    assert counts == sorted(counts, reverse=True)


def test_few_columns_are_enough_where_few_classes_have_the_mass():
    """Three likely classes among a thousand, others in every sample: two columns hold all but a thousandth."""
    f = torch.full((5, 1000), -20.0, dtype=torch.float64)
    f[
        torch.arange(5).unsqueeze(1), torch.randperm(1000, generator=torch.Generator().manual_seed(1))[:15].view(5, 3)
    ] = 0
    found = losses.CrossEntropy().leading_root(f, torch.zeros(5, dtype=torch.int64), 1e-3)
    assert found.count == 2 and 0 < found.left < 1e-3 * found.total


def test_a_confident_network_in_float32_has_finite_columns():
    f = torch.zeros(4, 50)
    f[:, 3] = torch.tensor([10.0, 60.0, 110.0, 500.0])
    found = losses.CrossEntropy().leading_root(f, torch.zeros(4, dtype=torch.int64), 1e-6)
    assert all(torch.isfinite(c).all() for c in found.columns) and found.left <= 1e-6 * found.total


def test_a_subclass_with_its_own_root_is_cut_by_its_own_columns():
    """A closed form of the parent must not stand for another root."""

    class Doubled(losses.CrossEntropy):
        def hessian_root(self, f, y):
            return (2**0.5 * s for s in super().hessian_root(f, y))

    f = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.int64)
    assert check(Doubled(), f, y, 0.1).total == pytest.approx(2 * check(losses.CrossEntropy(), f, y, 0.1).total)


def test_ignored_targets_leave_nothing():
    loss, f = losses.CrossEntropy(), torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
    found = loss.leading_root(f, torch.tensor([-100, -100]), 0.1)
    assert (found.left, found.total, found.count) == (0.0, 0.0, 1)
    assert not next(found.columns).any()


def test_multiples_and_sums_follow_their_terms():
    f = torch.randn(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.rand(4, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one = losses.BCEWithLogits().leading_root(f, y, 0.3)
    three = (3 * losses.BCEWithLogits()).leading_root(f, y, 0.3)
    assert (three.left, three.total) == pytest.approx((3 * one.left, 3 * one.total))
    check(losses.BCEWithLogits() + losses.MSE(), f, y, 0.3)


def test_order_and_columns_by_hand():
    squares = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 3.0]])
    order = largest(squares, 0.29)
    assert order.kept.tolist() == [[1, 0], [2, 0]] and (order.left, order.total) == (0.0, 10.0)
    order = largest(squares, 0.31)
    assert order.kept.tolist() == [[1], [2]] and order.left == pytest.approx(3.0)
    root = [torch.tensor([[1.0], [2**0.5]]), torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [3**0.5]])]
    found = of_columns(root, root, 0.31)
    assert torch.equal(next(found.columns), torch.tensor([[2.0], [3**0.5]]))
