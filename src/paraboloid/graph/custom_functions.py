"""Operations that a user wrote, `autograd.Function`s: whether their backward passes can be differentiated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from paraboloid.passes.torch_internals import is_custom, output_count, zeros_of

CUT = 1e-3  # relative


def check_twice(nodes: Iterable[Any], what: str) -> None:
    """Raise RuntimeError where the backward pass B of a custom function is cut off from the gradient g that it takes.

    B is linear in g, so that its derivative along g is B(g) itself: zero where a NumPy kernel or `once_differentiable`
    lies between.
    """
    for node in nodes:
        if not is_custom(node):
            continue
        below = [GradientEdge(*child) for child in node.next_functions if child[0] is not None]
        name = node.name().removesuffix("Backward")
        with torch.enable_grad():
            g = [_random(zeros_of(node, i)) for i in range(output_count(node))]
            try:
                found = torch.autograd.grad(
                    [GradientEdge(node, i) for i in range(len(g))], below, g, create_graph=True, allow_unused=True
                )
            except RuntimeError as e:
                raise _cut(what, name) from e
            found = [t for t in found if t is not None and t.is_floating_point()]
            w = [_random(t.detach()).detach() for t in found]
            total = sum((t * v).sum() for t, v in zip(found, w, strict=True)) if found else None
            if total is None or not total:
                continue
            value = total.detach().item()
            along = sum((d * t).sum().item() for d, t in _derivatives(total, g))
            if abs(along - value) > CUT * abs(value):
                raise _cut(what, name)


def _random(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator).to(like).requires_grad_()


def _derivatives(total: Tensor, g: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if not total.requires_grad:
        return []
    found = torch.autograd.grad(total, g, retain_graph=True, allow_unused=True)
    return [(d, t.detach()) for d, t in zip(found, g, strict=True) if d is not None]


def _cut(what: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: the backward pass of the autograd.Function {name} cannot be differentiated (a NumPy kernel, "
        "once_differentiable, a detached tensor), so that second derivatives of the model are lost; expected one in "
        "plain torch operations. 'diag_ggn' and pb.GGN need first derivatives alone."
    )
