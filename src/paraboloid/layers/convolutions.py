"""Convolutions in one, two and three dimensions, and transposed ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.registry import Use, channel, rule


def per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * axes if len(value) == 1 else value


def padded(
    x: Tensor, kernel: tuple[int, ...], padding: str | int | tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """The zero-padded input; "same" pads one more at the end where the total is odd, as torch does."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(a, a) for a in per_axis(0 if isinstance(padding, str) else padding, len(kernel))]  # a str: "valid"
    flat = [side for pair in reversed(pads) for side in pair]
    return F.pad(x, flat) if any(flat) else x


def patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """Padded input [N C *space] -> patches [N G C/G *kernel *out], a strided view."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    D = len(kernel)
    return x.unflatten(1, (groups, -1)).movedim(tuple(range(3 + D, 3 + 2 * D)), tuple(range(3, 3 + D)))


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    D = weight.dim() - 2
    if x.dim() != D + 2:
        return  # unbatched input: left to the fallback
    kernel, stride, dilation = tuple(weight.shape[2:]), per_axis(stride, D), per_axis(dilation, D)

    def right(rows: slice) -> Tensor:
        return patches(padded(x[rows], kernel, padding, dilation), kernel, stride, dilation, groups)

    q = weight[0].numel()
    yield Use(
        weight, (0,), right=right, q=q, q_axes=1 + D, groups=groups, input=x,
        arrange=lambda g: g.flatten(3).unflatten(2, (groups, -1)).mT,
    )  # fmt: skip
    if bias is not None:
        yield channel(bias)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def transposed_convolution(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """A convolution with input and output exchanged, so left is unfolded and right is not.

    Input position t is spread over the output at stride t - padding + dilation k; weight is [in, out / groups, k].

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
