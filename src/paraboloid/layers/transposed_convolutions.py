"""Transposed convolutions: a convolution with input and output exchanged, so left is unfolded and right is not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.convolutions import padded, patches, per_axis
from paraboloid.layers.registry import Use, channel, rule


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """Input position t is spread over the output at stride t - padding + dilation k; weight is [in, out / groups, k].

    The output elements that `output_padding` adds behind the last kernel get the bias only.
    """
    D = weight.dim() - 2
    if x.dim() != D + 2:
        return  # unbatched input: left to the fallback
    kernel, stride, dilation = tuple(weight.shape[2:]), per_axis(stride, D), per_axis(dilation, D)

    def arrange(g: Tensor) -> Tensor:
        z = padded(g.flatten(0, 1), kernel, padding, dilation)
        for axis in range(D):
            reach = (x.shape[2 + axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
            z = z.narrow(2 + axis, 0, reach)
        z = patches(z, kernel, stride, dilation, groups)  # [VN G p/k *kernel *T]
        return z.flatten(3 + D).flatten(2, 2 + D).mT.unflatten(0, (len(g), -1))

    def right(rows: slice) -> Tensor:
        return x[rows].unflatten(1, (groups, -1))

    yield Use(
        weight, (0,), right=right, flip=True, q=len(weight) // groups, q_axes=1, groups=groups, arrange=arrange, input=x
    )
    if bias is not None:
        yield channel(bias)
