"""Ordinary linear layers and convolutions of a model, read in the modules themselves: z = W abar at every row.

While such a module is watched, its own ``forward`` does what `torch.nn`'s does and notes the sums.  No rule is asked
and no call recorded, which is most of what a step of a small network costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.passes.torch_internals import DisableTorchFunction, own_tensors, saved_tensor_hooks

OPERATIONS: dict[type, Any] = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
LARGE = 2**21  # multiplications from which a product is worth more than some calls of Python


@dataclass(frozen=True)
class Layer:
    """Which parameters form W = [weight, bias], by name."""

    weight: str
    bias: str | None
    flip: bool  # the weight is stored as [q, p]


class PlainLayer:
    """A module that is such a layer at present."""

    def __init__(self, module: Any, layer: Layer):
        self.module, self.layer, self.op = module, layer, OPERATIONS[type(module)]
        self.parameters = own_tensors(module)[0]
        self.is_linear, self.axes = self.op is F.linear, module.weight.dim()  # of a convolution's input on a batch
        self.channels = -1 if self.is_linear else 1  # the output's axis that is p

    def arguments(self, x: Tensor) -> tuple | None:
        """Of the operation on a batch x, in the precision of the weight and under gradients; else None."""
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if not torch.is_grad_enabled() or x.dtype != weight.dtype or not weight.requires_grad or is_cast(x):
            return None
        if bias is not None and not bias.requires_grad:
            return None
        if self.is_linear:
            return (x, weight, bias) if x.dim() > 1 else None
        m = self.module
        return (x, weight, bias, m.stride, m.padding, m.dilation, 1) if x.dim() == self.axes else None

    def sum(self, z: Tensor) -> Tensor:
        """Of z over samples and positions, [p], in at least float32."""
        z = z.detach()
        if z.dtype in (torch.float16, torch.bfloat16):
            z = z.float()
        if self.is_linear:
            return z.sum(0) if z.dim() == 2 else z.reshape(-1, z.shape[-1]).sum(0)
        return z.flatten(2).sum((0, 2))


def is_cast(x: Tensor) -> bool:
    """Whether autocast chooses the precision."""
    return torch.is_autocast_enabled(x.device.type)


def plain_layers(root: nn.Module, names: Mapping[int, str]) -> list[PlainLayer]:
    """Those of a model whose parameters are all among `names` (name by id)."""
    found = []
    for m in root.modules():
        if type(m) not in OPERATIONS or "forward" in vars(m) or getattr(m, "groups", 1) > 1:
            continue
        ids = [id(p) for p in (m.weight, m.bias) if p is not None]
        if getattr(m, "padding_mode", "zeros") == "zeros" and all(i in names for i in ids):
            weight, bias = names[ids[0]], None if m.bias is None else names[ids[1]]
            found.append(PlainLayer(m, Layer(weight, bias, False)))
    return found


Reader = Callable[[PlainLayer, tuple | None], Tensor | None]


class Watched:
    """A context in which `read(layer, arguments)` makes the output of each layer, if it gives one.

    The arguments are None for a call that it cannot make.
    """

    def __init__(self, layers: list[PlainLayer], read: Reader):
        self._forward = [(vars(layer.module), partial(_forward, layer, read)) for layer in layers]

    def __enter__(self) -> None:
        self._set = [(own, forward) for own, forward in self._forward if "forward" not in own]
        for own, forward in self._set:
            own["forward"] = forward

    def __exit__(self, *exception: Any) -> None:
        for own, _ in self._set:
            del own["forward"]


def _forward(layer: PlainLayer, read: Reader, input: Tensor) -> Tensor:
    with DisableTorchFunction():
        z = read(layer, layer.arguments(input))
    return type(layer.module).forward(layer.module, input) if z is None else z


def is_large(args: tuple) -> bool:
    """Whether the weight's gradient takes long."""
    return args[0].numel() // args[1].shape[1] * args[1].numel() >= LARGE


def has_full_bias(args: tuple) -> bool:
    """Whether there is one whose gradient is summed in at least float32."""
    return args[2] is not None and args[2].dtype not in (torch.float16, torch.bfloat16)


def saved_elsewhere() -> bool:
    """Whether what autograd saves is counted or moved: a checkpoint expects the same tensors in both passes."""
    return saved_tensor_hooks() is not None


def without_weight_gradient(op: Any, args: tuple) -> Tensor:
    """The layer's output, from which the weight's gradient is zero without being computed.

    The zeros come along a path through the bias, so that whoever looks at gradients after the pass finds some.
    """
    x, weight, bias, *others = args
    first = weight[(slice(None), *[0] * (weight.dim() - 1))]
    return op(x, weight.detach(), first * 0 if bias is None else torch.add(bias, first, alpha=0), *others)
