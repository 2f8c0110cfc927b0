"""Operators with structure as plain dictionaries of tensors, and back: for `torch.save` and checkpoints.

A state names the operator's *kind*, which outlives every move of a class, and the version of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from paraboloid.passes import trees

if TYPE_CHECKING:
    from paraboloid.operators.linear_operator import LinearOperator

VERSION = 1  # states without one are of this version
KINDS: dict[str, Any] = {}  # the class of each kind: `class LowRank(LinearOperator, kind="LowRank")` enters itself


def load(state: dict[str, Any], model: nn.Module | Mapping[str, Tensor]) -> LinearOperator:
    """The operator that `state_dict` described, over the parameters of a model (or a dict of them by name).

    Raises ValueError where names or shapes are not those of the operator that was saved, and for an unknown kind.
    """
    kind, version = state["kind"], state.get("version", 1)
    if version > VERSION:
        raise ValueError(f"the state is of version {version}; expected at most {VERSION}. Update paraboloid.")
    if kind not in KINDS:
        raise ValueError(f"the state is of kind {kind!r}, which is not known; expected one of {sorted(KINDS)}.")
    parameters = model if isinstance(model, Mapping) else trees.parameters(model)
    detached = {k: p.detach() for k, p in parameters.items()}
    expected = {k: list(p.shape) for k, p in detached.items()}
    if list(state["parameters"].items()) != list(expected.items()):
        raise ValueError(f"the state is that of an operator over {state['parameters']}; expected the model's "
                         f"parameters {expected}.")  # fmt: skip
    return KINDS[kind]._of_state(state, detached)
