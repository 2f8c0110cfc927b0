"""Patches of images in matrices, whichever way they are copied."""

import pytest
import torch
from torch.nn.functional import unfold as torch_unfold

from paraboloid.reductions import right as patches_module


def patches(x, kernel, stride, dilation, groups=1):
    """Strided rows [n G c h w H W] of images [n C X Y], and torch's [n G T q]."""
    n, C, X, Y = x.shape
    H, W = ((size - dilation * (kernel - 1) - 1) // stride + 1 for size in (X, Y))
    sn, sc, sx, sy = x.stride()
    shape = (n, groups, C // groups, kernel, kernel, H, W)
    rows = x.as_strided(
        shape, (sn, C // groups * sc, sc, dilation * sx, dilation * sy, stride * sx, stride * sy), x.storage_offset()
    )
    expected = torch_unfold(x, kernel, dilation, 0, stride)  # [n C k k T]
    return rows, expected.unflatten(1, (groups, -1)).mT


@pytest.mark.parametrize("memory", ["plain", "channels last", "a part of another"])
@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "groups"), [
    (6, 3, 1, 1, 1), (6, 3, 2, 1, 1), (7, 2, 1, 3, 2), (24, 3, 1, 1, 1), (24, 5, 2, 2, 2), (5, 1, 1, 1, 1), (4, 4, 1, 1, 2),
])  # fmt: skip
def test_patches(size, kernel, stride, dilation, groups, memory):
    for n in (2, 11):  # few samples are copied run by run, more are gathered
        x = torch.randn(n, 4, size, size, generator=torch.Generator().manual_seed(0))
        if memory == "channels last":
            x = x.to(memory_format=torch.channels_last)
        if memory == "a part of another":
            x = torch.cat([torch.zeros(1, 4, size, size), x])[1:]
        rows, expected = patches(x, kernel, stride, dilation, groups)
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                assert torch.equal(patches_module.unfold(rows, 3), expected)


def test_runs():
    assert patches_module._run((2, 3, 4), (12, 4, 1)) == 24
    assert patches_module._run((2, 3, 4), (24, 4, 1)) == 12
    assert patches_module._run((3, 4), (9, 2)) == 4
    assert patches_module._run((5, 1), (1, 7)) == 1
