"""Sums over lists of tensors: the same for few entries, which are joined, and for many, which are read one by one."""

import math

import pytest
import torch

from paraboloid.optim import foreach


def lists(dtypes, count=3):
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (5,), (2, 3, 1, 2)]
    made = [[torch.randn(s, generator=g, dtype=torch.float64).to(d) for s, d in zip(shapes, dtypes, strict=True)]
            for _ in range(count)]  # fmt: skip
    made[0][0] = made[0][0].T.contiguous().T  # another order in memory
    return made


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("dtypes", [[torch.float64] * 4, [torch.float32] * 4, [torch.float64, torch.float32] * 2,
                                    [torch.bfloat16] * 4])  # fmt: skip
def test_dot_and_along_are_those_of_all_entries(few, dtypes, monkeypatch):
    monkeypatch.setattr(foreach, "FEW", few)
    xs, ys, zs = lists(dtypes)
    kept = [[t.clone() for t in part] for part in (xs, ys, zs)]
    flat = [torch.cat([t.double().flatten() for t in part]) for part in (xs, ys, zs)]
    tolerance = 1e-12 if set(dtypes) == {torch.float64} else 1e-6 if torch.bfloat16 not in dtypes else 3e-2
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # noqa: E731
    close(foreach.dot(xs, ys), flat[0] @ flat[1])
    close(foreach.along(xs, ys, zs), flat[0] @ (flat[1] - flat[2]))
    for part, before in zip((xs, ys, zs), kept, strict=True):
        assert all(torch.equal(t, b) for t, b in zip(part, before, strict=True))


def test_what_is_joined_is_read_as_the_list_is(monkeypatch):
    xs, ys, _ = lists([torch.float64] * 4)
    whole = foreach.joined(xs)
    assert whole is not None and torch.equal(whole, torch.cat([x.flatten() for x in xs]))
    torch.testing.assert_close(foreach.dot(xs, ys, whole), foreach.dot(xs, ys), rtol=1e-14, atol=0)
    assert foreach.finite(xs, whole)
    assert foreach.finite([torch.full((3,), 1e200, dtype=torch.float64)], torch.full((3,), 1e200, dtype=torch.float64))
    whole[-1] = math.inf
    assert not foreach.finite(xs, whole)
    monkeypatch.setattr(foreach, "FEW", 0)
    assert foreach.joined(xs) is None and foreach.joined([]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, foreach.RUN - 1, foreach.RUN, 3 * foreach.RUN + 5])
def test_dots_of_long_vectors_keep_their_digits(dtype, n, monkeypatch):
    monkeypatch.setattr(foreach, "FEW", 0)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    found = foreach.dot([x, x], [y, x])
    assert found.dtype == torch.float64
    exact = x.double() @ (y.double() + x.double())
    size = x.double().abs() @ (y.double().abs() + x.double().abs())
    assert abs(found - exact) < (1e-6 if dtype == torch.float32 else 1e-14) * size
