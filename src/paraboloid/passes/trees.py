"""Vectors in parameter space: dict[name, Tensor], and the flat [D] or [D, K] tensors in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes.wrappers import plain_parameters


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tree of tuples, lists, dicts and dataclasses with the function of every tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {k: mapped(function, t) for k, t in tree.items()}
    if isinstance(tree, tuple | list):
        found = [mapped(function, t) for t in tree]
        return type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)  # a named tuple
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: mapped(function, getattr(tree, f.name)) for f in fields(tree) if f.init})
    return tree


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take part, by plain name, in the order of `named_parameters`: those with requires_grad.

    Raises ValueError for a model without any, for complex or integer ones, and for parameters on several devices.
    """
    found: dict[str, nn.Parameter] = {}
    devices: set[torch.device] = set()
    for name, p in plain_parameters(model).items():
        if not p.requires_grad:
            continue
        if not p.is_floating_point():
            pairs = " Keep it as pairs of real numbers, read by torch.view_as_complex." if p.is_complex() else ""
            raise ValueError(f"parameter {name!r} has dtype {p.dtype}; expected a real floating-point type.{pairs}")
        found[name] = p
        devices.add(p.device)
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True, so there is nothing to "
                         "differentiate; expected at least one.")  # fmt: skip
    if len(devices) > 1:
        raise ValueError(f"parameters lie on several devices {sorted(map(str, devices))}; expected one. Move the model "
                         "with .to(device).")  # fmt: skip
    return found


def flatten(tree: Mapping[str, Tensor], order: Mapping[str, Tensor]) -> Tensor:
    """dict -> [D], or [D, K] when every tensor carries a trailing axis of K columns; in the order of `order`."""
    check_names(tree, order)
    columns = [tree[k].shape[p.dim() :] for k, p in order.items()]
    for (k, p), extra in zip(order.items(), columns, strict=True):
        if tree[k].shape != p.shape + columns[0] or len(extra) > 1:
            raise ValueError(f"the vector's entry {k!r} has shape {tuple(tree[k].shape)}; expected {tuple(p.shape)}"
                             " (all entries may carry one trailing axis of columns).")  # fmt: skip
    return torch.cat([tree[k].reshape(p.numel(), *columns[0]) for k, p in order.items()])


def unflatten(vector: Tensor, order: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[D] or [D, K] -> dict of views, [*shape] or [*shape, K]."""
    size = sum(p.numel() for p in order.values())
    if vector.dim() not in (1, 2) or len(vector) != size:
        raise ValueError(f"the vector has shape {tuple(vector.shape)}; expected [{size}] or [{size}, K], or a dict by "
                         "parameter name.")  # fmt: skip
    pieces = vector.split([p.numel() for p in order.values()])
    return {k: t.reshape(p.shape + vector.shape[1:]) for (k, p), t in zip(order.items(), pieces, strict=True)}


def check_names(tree: Mapping[str, Tensor], order: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the vector has exactly the parameters' names."""
    missing, unknown = [k for k in order if k not in tree], [k for k in tree if k not in order]
    if missing or unknown:
        raise ValueError(f"the vector's names do not match the parameters: missing {missing}, unknown {unknown}; "
                         f"expected {list(order)}.")  # fmt: skip
