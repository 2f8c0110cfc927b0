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
    """The keys of those tensors from whose graphs a path ends at the leaf: no node is walked twice, and none once a
    path is found."""
    known: dict[Any, bool] = {}  # whether a path leads from a node to the leaf
    return {i for i, t in ts.items() if t is leaf or (t.grad_fn is not None and _leads(t.grad_fn, leaf, known))}


def _leads(root: Any, leaf: Tensor, known: dict[Any, bool]) -> bool:
    if root in known:
        return known[root]
    path = [(root, iter(root.next_functions))]
    while path:
        node, rest = path[-1]
        for below, _ in rest:
            if below is None:
                continue
            leads = True if getattr(below, LEAF, None) is leaf else known.get(below)
            if leads:
                known.update((above, True) for above, _ in path)
                return True
            if leads is None:
                path.append((below, iter(below.next_functions)))
                break
        else:
            known[node] = False
            path.pop()
    return False


def custom_functions(t: Tensor) -> list[str]:
    """The names of the `autograd.Function`s, written in Python, that t's graph goes through."""
    return [type(node).__name__.removesuffix("Backward") for node in nodes(t) if is_custom(node)]
