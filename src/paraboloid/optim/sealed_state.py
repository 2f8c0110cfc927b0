"""An optimiser's own state as one value among those of its parameters, for what keeps nothing else of a state.

`torch.distributed.checkpoint` keeps `state` and `param_groups` only, and loads into tensors that a fresh optimiser has
already: factors, whose shapes a fresh optimiser does not know, would be left out without a word.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "paraboloid"


class Sealed(bytes):
    """A tree of tensors and plain values that nothing looks into: it counts as bytes, and is pickled as a dict, so that
    torch.load(weights_only=True) takes it."""

    tree: Mapping[str, Any]

    def __new__(cls, tree: Mapping[str, Any]) -> Sealed:
        self = super().__new__(cls)
        self.tree = tree
        return self

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.tree.items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sealed:
        return Sealed(copy.deepcopy(self.tree, memo))


def sealed(state: Mapping[int, Mapping[str, Any]], own: Mapping[str, Any], at: int, count: int, rank: int) -> Any:
    """torch's state of `count` parameters with `own`, and with all of it once more, in that of the parameter `at`; a
    generator's state is this rank's, so its name is too."""
    found = {i: dict(state.get(i, {})) for i in range(count)}
    found[at] |= {KEY: Sealed({**own, "state": dict(state)}), _of_rank(rank): own["generator"]}
    return found


def opened(
    state: Mapping[Any, Mapping[str, Any]], ids: Sequence[Any], rank: int
) -> tuple[dict[Any, dict[str, Any]], dict[str, Any] | None]:
    """torch's state as it was, and what was sealed (None where nothing was).

    ids: what the saved groups call the parameters, in order: numbers, or names from torch.distributed.checkpoint
    """
    own: dict[str, Any] | None = None
    found: dict[Any, dict[str, Any]] = {}
    for key, values in state.items():
        kept = values.get(KEY)
        if kept is not None:
            own = dict(kept.tree if isinstance(kept, Sealed) else kept)
            own["generator"] = values.get(_of_rank(rank), own["generator"])
        found[key] = {k: v for k, v in values.items() if k != KEY and not k.startswith(_of_rank(""))}
    if own is not None:
        found = {ids[i]: dict(v) for i, v in own.pop("state").items()}
    return found, own


def _of_rank(rank: int | str) -> str:
    return f"{KEY}_generator_{rank}"
