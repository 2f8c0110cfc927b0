"""Derived weights that hold the samples themselves: learned queries expanded to the batch, a constant initial state.

Everything computed from parameters alone is clean, so ``query.expand(N, -1, -1) @ W`` is a weight with an axis of
samples, and what consumes it has no rule.  Such a weight is taken for data instead: the operations that made it become
calls of their own, if it turns out that samples do not mix on the way to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from paraboloid.engine.per_sample import blocked
from paraboloid.engine.recorder import Call
from paraboloid.engine.reindexed_weights import Alias
from paraboloid.engine.sample_independence import Layouts


def promote(
    calls: Sequence[Call], layouts: Layouts, candidates: Sequence[Call], aliases: Mapping[int, Alias]
) -> list[Call] | None:
    """The calls after one more step, in which weights that no rule can treat count as data; None if there is no step.

    `candidates` are the recorded operations on weights alone.
    """
    at = {call.edge.node: call for call in candidates}
    chosen: dict[Any, Call] = {}
    data: set[int] = set()
    for call, layout in zip(calls, layouts, strict=True):
        for w in blocked(call, layout, aliases) if layout is not None else ():
            if (found := _makers(w, at)) is not None:
                chosen |= found
                data.add(id(w))
    if not data:
        return None
    growing = True
    while growing:  # whatever else depends on a chosen operation must be cut there too, or it would count twice
        growing = False
        for call in [*calls, *chosen.values()]:
            for w in call.weights:
                if id(w) not in data and any(node in chosen for node in _nodes(w)):
                    if (found := _makers(w, at)) is None:
                        return None
                    chosen |= found
                    data.add(id(w))
                    growing = True
    known = {call.edge.node for call in calls}
    result = []
    for call in [*calls, *(c for node, c in chosen.items() if node not in known)]:
        cut = [w for w in call.weights if id(w) in data]
        if len(cut) < len(call.weights):
            rest = [w for w in call.weights if id(w) not in data]
            result.append(replace(call, weights=rest, below=call.below + [w.grad_fn for w in cut]))
    return result


def replay(
    calls: list[Call], steps: Sequence[Layouts], candidates: Sequence[Call], aliases: Mapping[int, Alias]
) -> tuple[list[Call], Layouts] | None:
    """The calls and layouts that the same steps led to before; None where these calls do not take them."""
    if not steps:
        return None
    layouts = steps[0]
    for following in steps[1:]:
        further = promote(calls, layouts, candidates, aliases)
        if further is None or len(further) != len(following):
            return None
        calls, layouts = further, following
    return calls, layouts


def _nodes(w: Tensor, stop: Mapping[Any, Any] | None = None) -> Iterator[Any]:
    """The graph nodes that w is computed by, and not what lies beyond those in `stop`."""
    seen, stack = set(), [w.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            if stop is None or node not in stop:
                stack += [n for n, _ in node.next_functions]


def _makers(w: Tensor, at: Mapping[Any, Call]) -> dict[Any, Call] | None:
    """The nearest candidates that w is computed by; None where a parameter is reached without meeting one."""
    nodes = list(_nodes(w, stop=at))
    if any(hasattr(node, "variable") and node not in at for node in nodes):
        return None
    return {node: at[node] for node in nodes if node in at} or None
