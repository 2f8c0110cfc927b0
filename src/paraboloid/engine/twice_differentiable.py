"""Forward passes whose second derivatives are right: some of torch's fused operations have none, or a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from paraboloid.layers.embeddings import bags, unchanged_embedding
from paraboloid.passes.torch_internals import weight_norm


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run a forward pass inside: fused attention gives way to the math kernel; weight_norm, group norm and bags are
    spelled out; pairs of real numbers may be read as complex ones."""
    with sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
        yield


class TwiceDifferentiable(TorchFunctionMode):
    """Calls of torch whose second derivative is wrong, spelled out in operations whose second derivative is right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is weight_norm:  # the fused kernel's double backward takes ||v|| for a constant
            return _weight_norm(*args, **kwargs)
        if func is F.group_norm:  # the process can end inside its double backward
            return _group_norm(*args, **kwargs)
        if func is F.embedding_bag:  # has no double backward
            return _embedding_bag(*args, **kwargs)
        if func is F.embedding and (found := unchanged_embedding(*args, **kwargs)) is not NotImplemented:
            return found
        z = func(*args, **kwargs)
        if func is torch.view_as_complex and z.grad_fn is not None:  # takes views of its vectors, wherever they start
            z.grad_fn.register_hook(_in_own_memory)
        return z


def _in_own_memory(inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    """The gradient [..., 2] put together anew: its own derivative is then one of a tensor, and no view of a vector."""
    (g,) = inputs
    return (g if g is None or not g.requires_grad else torch.stack(g.unbind(-1), -1),)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if x.dim() < 2 or x.shape[1] % num_groups:
        return F.group_norm(x, num_groups, weight, bias, eps)  # it says what is wrong
    groups = x.reshape(len(x), num_groups, -1)
    centred = groups - groups.mean(2, keepdim=True)
    z = (centred * (centred.square().mean(2, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    z = z if weight is None else z * weight.view(-1, *[1] * (x.dim() - 2))
    return z if bias is None else z + bias.view(-1, *[1] * (x.dim() - 2))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding_bag(idx: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if (found := bags(idx, weight, *args, **kwargs)) is None:
        return F.embedding_bag(idx, weight, *args, **kwargs)
    idx, factor = found
    return (F.embedding(idx.clamp(min=0), weight) * factor.unsqueeze(-1)).sum(1)
