"""Record a forward pass: which tensors are clean, and every call that mixes weights with data.

A tensor is *clean* if it is a parameter, a buffer, or computed from clean tensors only; every other tensor is data (the
safe default: a misclassification costs speed or raises, it never gives wrong numbers).  A *weight* is a clean tensor
that requires grad: a parameter, or derived from parameters.  A *call* is an operation that mixes weights with data.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from paraboloid.layers import RULES

TURNS = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}
STRETCHES = {
    Tensor.expand, Tensor.expand_as, Tensor.to, Tensor.type_as, Tensor.float, Tensor.double, Tensor.contiguous,
    torch.broadcast_to, Tensor.broadcast_to,
}  # fmt: skip
IN_PLACE_SUMS = {Tensor.add_, Tensor.__iadd__}  # in-place calls whose rule needs no value of the mutated input


@dataclass
class Call:
    """One operation that mixes weights with data, and what is needed to take its gradient apart later."""

    op: Callable
    args: tuple
    kwargs: dict
    edge: GradientEdge
    shape: torch.Size
    weights: list[Tensor]
    below: list[Any]  # graph nodes of the data inputs: where the completeness walk goes on
    held: list[tuple[Tensor, int]]  # tensors and the versions they had


@dataclass
class Alias:
    """A weight that only re-indexes `root`: transposed, expanded or cast; or a lookup of fixed positions in a table."""

    root: Tensor
    turned: bool = False
    table: tuple[Tensor, Tensor] | None = None  # (embedding table, positions)


def tensors(*trees_: Any) -> Iterator[Tensor]:
    for t in trees_:
        if isinstance(t, Tensor):
            yield t
        elif isinstance(t, tuple | list):
            yield from tensors(*t)
        elif isinstance(t, dict):
            yield from tensors(*t.values())


def _unshared(z: Tensor, inputs: list[Tensor]) -> Tensor:
    """z as a tensor of its own where the operation made it as a view of its inner result (F.linear on [N T D]).

    An in-place activation on such a view would be routed around the call's output in the graph.
    """
    if not z._is_view() or any(z._base is t or z._base is t._base for t in inputs):
        return z
    return torch.ops.aten._unsafe_view(z, z.shape)


def lowered(op: Callable) -> Callable | None:
    """A composite Python function with its own code, blind to torch-function modes, so that what it calls is recorded.

    `F.multi_head_attention_forward` and its like hide the products inside behind one call.
    """
    if not isinstance(op, types.FunctionType):
        return None
    switches = [n for n in op.__code__.co_names if n.startswith("has_torch_function")]
    if not switches:
        return None
    blind = op.__globals__ | dict.fromkeys(switches, lambda *_: False)
    function = types.FunctionType(op.__code__, blind, op.__name__, op.__defaults__, op.__closure__)
    function.__kwdefaults__ = op.__kwdefaults__
    return function


class Recorder(TorchFunctionMode):
    """Notes the calls of everything that runs while it is active; `names` maps the ids of the tracked parameters."""

    def __init__(self, model: nn.Module, names: Mapping[int, str]):
        super().__init__()
        self.names = names
        self.calls: list[Call] = []
        self.clean: dict[int, tuple[Tensor, int]] = {}
        self.alias: dict[int, Alias] = {}
        for module in model.modules():
            self._mark(*module._parameters.values(), *module._buffers.values(), *vars(module).values())

    def _mark(self, *things: Any) -> None:
        """Clean until its version moves."""
        self.clean.update({id(t): (t, t._version) for t in tensors(*things)})

    def _is_clean(self, t: Tensor) -> bool:
        known = self.clean.get(id(t))
        return known is not None and known[1] == t._version

    def __torch_function__(self, op, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = list(tensors(args, kwargs))
        clean = [self._is_clean(t) for t in inputs]
        weights = []
        if torch.is_grad_enabled():
            weights = [t for t, c in zip(inputs, clean, strict=True) if c and t.requires_grad]
        mixes = bool(weights) and not all(clean) and op not in STRETCHES
        if mixes and op not in RULES and (inner := lowered(op)) is not None:
            with self:
                return inner(*args, **kwargs)
        before = [t._version for t in inputs]
        below = [
            get_gradient_edge(t).node
            for t, c in zip(inputs, clean, strict=True) if mixes and not c and t.requires_grad
        ]  # fmt: skip
        z = op(*args, **kwargs)
        if all(clean) or (op in STRETCHES and clean[0]):
            self._note_clean(op, args, kwargs, inputs, clean, before, weights, z)
        elif mixes and isinstance(z, Tensor) and z.requires_grad:
            z = _unshared(z, inputs)
            moved = any(t._version != b for t, b in zip(inputs, before, strict=True))
            if not moved or op in IN_PLACE_SUMS:  # the completeness walk finds what other in-place calls hide
                held = [] if moved else list(zip(inputs, before, strict=True))
                self.calls.append(Call(op, args, kwargs, get_gradient_edge(z), z.shape, weights, below, held))
        return z

    def _note_clean(self, op, args, kwargs, inputs, clean, before, weights, z) -> None:
        for t, c, b in zip(inputs, clean, before, strict=True):
            if c and t._version != b:  # changed in place by clean values
                self._mark(t)
                self.alias.pop(id(t), None)
        self._mark(z)
        if not weights or not isinstance(z, Tensor) or z is inputs[0]:
            return
        source = self.alias.get(id(inputs[0]), Alias(inputs[0]))
        if op in STRETCHES:
            self.alias[id(z)] = source
        elif op in TURNS and source.root.dim() == 2 and source.table is None:
            self.alias[id(z)] = Alias(source.root, not source.turned)
        elif op is F.embedding and id(args[1]) in self.names and _is_plain(*args, **kwargs):
            self.alias[id(z)] = Alias(z, False, (args[1], args[0]))


def _is_plain(idx, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    """Whether an embedding only looks up rows: nothing masked, renormalised or scaled."""
    return padding_idx is None and max_norm is None and not scale_grad_by_freq
