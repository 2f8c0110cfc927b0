"""What autograd's graph of a tensor reaches: leaves, custom functions; a few microseconds for each node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from paraboloid.passes.torch_internals import LEAF, is_custom


def nodes(t: Tensor) -> Iterator[Any]:
    """The nodes of t's graph, each once."""
    stack, seen = [t.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack += [below for below, _ in node.next_functions]


def depends(t: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Whether some path of t's graph ends at one of the leaves, or t is one."""
    wanted = {id(leaf) for leaf in leaves}
    return id(t) in wanted or any(id(getattr(node, LEAF, None)) in wanted for node in nodes(t))


def custom_functions(t: Tensor) -> list[str]:
    """The names of the `autograd.Function`s, written in Python, that t's graph goes through."""
    return [type(node).__name__.removesuffix("Backward") for node in nodes(t) if is_custom(node)]
