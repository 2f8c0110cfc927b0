"""Sums over lists of tensors: the same for few entries, which are joined, and for many, which are read one by one."""

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
