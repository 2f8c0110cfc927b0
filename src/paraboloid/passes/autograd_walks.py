"""What autograd's graph of a tensor reaches: leaves, custom functions; a few microseconds for each node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def depending(ts: Mapping[int, Tensor], leaf: Tensor) -> set[int]:
    """The keys of those tensors from whose graphs a path ends at the leaf: one walk through all of them."""
    above: dict[Any, list[Any]] = {}  # the nodes that lead to a node
    stack = [t.grad_fn for t in ts.values() if t.grad_fn is not None]
    seen = set(stack)
    ends = []
    while stack:
        node = stack.pop()
        if getattr(node, LEAF, None) is leaf:
            ends.append(node)
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
                if below not in seen:
                    seen.add(below)
                    stack.append(below)
    leading = set(ends)
    while ends:
        new = [node for node in above.get(ends.pop(), ()) if node not in leading]
        leading.update(new)
        ends += new
    return {i for i, t in ts.items() if t is leaf or t.grad_fn in leading}


def custom_functions(t: Tensor) -> list[str]:
    """The names of the `autograd.Function`s, written in Python, that t's graph goes through."""
    return [type(node).__name__.removesuffix("Backward") for node in nodes(t) if is_custom(node)]
