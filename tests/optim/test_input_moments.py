"""Second moments of inputs next to the rows written out, for short and long rows and for patches in pieces."""

import pytest
import torch
import torch.nn.functional as F

from paraboloid.layers import RULES
from paraboloid.optim import input_moments
from paraboloid.passes import memory
from paraboloid.reductions.kronecker_factors import LARGE

F64 = torch.float64


def expected(rows):
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    return rows.T @ rows


@pytest.mark.parametrize("q", [1, 5, LARGE - 1, LARGE, LARGE + 3])
def test_rows(q):
    x = torch.randn(7, q, generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(input_moments.of_rows(x), expected(x))
    weight = torch.zeros(2, q, dtype=F64)
    found = input_moments.of_layer(F.linear, (x.view(7, 1, q), weight, None), F64)
    torch.testing.assert_close(found, expected(x))
    use = next(iter(RULES[F.linear](x, weight, None)))
    torch.testing.assert_close(input_moments.of_use(use, x.new_zeros(7, 2)), expected(x))


@pytest.mark.parametrize("room", [None, 1])
def test_patches(room, monkeypatch):
    if room is not None:
        monkeypatch.setattr(memory.PIECES, "of", lambda *args, **options: room)
    x = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    weight = torch.zeros(2, 3, 2, 2, dtype=F64)
    args = (x, weight, None, (2, 1), (1, 0), (1, 1), 1)
    rows = F.unfold(x, (2, 2), padding=(1, 0), stride=(2, 1)).mT.flatten(0, 1)
    torch.testing.assert_close(input_moments.of_layer(F.conv2d, args, F64), expected(rows))


def test_half_precision_is_summed_in_float32():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half()
    found = input_moments.of_layer(F.linear, (x, torch.zeros(2, 3).half(), None), torch.float16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(x.float()))
