"""Record a forward pass: which tensors are clean, and every call that mixes weights with data.

A tensor is *clean* if it is a parameter, a buffer, a number (no axes, no gradient), or computed from clean tensors only
(else it is data, the safe default: a misclassification costs speed or raises, it never gives wrong numbers). A *weight*
is a clean tensor that requires grad: a parameter, or derived from parameters.  A *call* is an operation that mixes
weights with data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from paraboloid.engine.handed_in import HandedIn
from paraboloid.engine.reindexed_weights import STRETCHES, Alias, alias_of
from paraboloid.layers import LOWERINGS, RULES, Use
from paraboloid.layers.normalization import Hook, constant_statistics, uses_batch_statistics
from paraboloid.passes.modes import autocast_dtype
from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.torch_internals import (
    DisableTorchFunction,
    base_of,
    casts_somewhere,
    is_view,
    own_tensors,
    seen_inside,
    unsafe_view,
    version,
    versions,
)

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes: parameters, buffers, hooks
# In-place calls whose rule needs no value of what is mutated: a sum, and running statistics in training mode.
HARMLESS = {Tensor.add_, Tensor.__iadd__, F.batch_norm, F.instance_norm}


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
    autocast: torch.dtype | None  # what it ran under
    is_complex: bool = False  # whether its output is

    @property
    def is_fresh(self) -> bool:
        """Whether nothing that it used was modified since."""
        return versions(list(map(FIRST, self.held))) == list(map(SECOND, self.held))

    def uses(self) -> list[Use]:
        """What the operation's rule says of these arguments; nothing where there is none that takes them."""
        try:
            found = RULES[self.op](*self.args, **self.kwargs)
        except (KeyError, TypeError):  # TypeError: keywords other than the rule's own
            return []
        return list(found)

    def product(self) -> Use | None:
        """The use of a weight that multiplies rows of an input, where there is exactly one in the call."""
        found = [u for u in self.uses() if u.right is not None and not u.lookup]
        return found[0] if len(found) == 1 else None

    def input_edge(self, use: Use | None) -> GradientEdge | None:
        """Where curvature goes on below, if it does so through the input of `use` alone, in which z is then linear."""
        if use is None or use.input is None or not use.input.requires_grad or not use.is_constant:
            return None
        edge = get_gradient_edge(use.input)
        return edge if self.below == [edge.node] else None


def _call(op, args, kwargs, z: Tensor, weights, below, held) -> Call:
    return Call(
        op, args, kwargs, get_gradient_edge(z), z.shape, weights, below, held,
        autocast_dtype(z.device) if casts_somewhere() else None, z.is_complex(),
    )  # fmt: skip


FIRST, SECOND = itemgetter(0), itemgetter(1)
CONTAINERS = (tuple, list, dict)
KEEPERS = (Tensor, *CONTAINERS)


def tensors(*trees: Any) -> list[Tensor]:
    """All tensors in some containers of containers, in order."""
    found = []
    for t in trees:
        if isinstance(t, Tensor):
            found.append(t)
        elif isinstance(t, CONTAINERS) and t:
            found += tensors(*(t.values() if isinstance(t, dict) else t))
    return found


def _unmoved(ts: list[Tensor], before: list[int]) -> list[tuple[Tensor, int]]:
    """Those that still have the versions they had, with these."""
    if (now := versions(ts)) == before:
        return list(zip(ts, now, strict=True))
    return [(t, b) for t, b, v in zip(ts, before, now, strict=True) if v == b]


def _unshared(z: Tensor, inputs: list[Tensor]) -> Tensor:
    """z, a view, as a tensor of its own where the operation made it of its inner result (F.linear on [N T D]).

    An in-place activation on such a view would be routed around the call's output in the graph.
    """
    if any((base := base_of(z)) is t or base is base_of(t) for t in inputs):
        return z
    return unsafe_view(z, z.shape)


def lowered(op: Callable) -> Callable | None:
    """What to run in place of an operation without a rule, so that the calls inside it are recorded.

    A recurrent layer is unrolled.  A composite Python function (`F.multi_head_attention_forward` and its like hide the
    products inside behind one call) runs with its own code.
    """
    if op in RULES or op in LOWERINGS:
        return LOWERINGS.get(op)
    return seen_inside(op)


def _modules(model: Any) -> list[nn.Module]:
    """The modules of a model; of a plain callable those that it holds."""
    if isinstance(model, nn.Module):
        return modules_of(model)
    held: list[Any] = list(getattr(model, "__dict__", {}).values())
    return [m for part in held if isinstance(part, nn.Module) for m in modules_of(part)]


def _own_parameters(model: Any) -> list[Tensor]:
    return [p for _, p in model.named_parameters()]


class Recorder(TorchFunctionMode):
    """Notes the calls of everything that runs while it is active; `names` maps the ids of the tracked parameters."""

    def __init__(self, model: nn.Module, names: Mapping[int, str], modules: list[nn.Module] | None = None):
        super().__init__()
        self.names = names
        self.calls: list[Call] = []
        self.noted: Callable[[Call, Tensor], None] | None = None  # told of every call with its output
        self.candidates: list[Call] = []  # operations on weights alone, of which some may turn out to be calls
        self.clean: dict[int, tuple[Tensor, int]] = {}
        self.handed_in = HandedIn()
        self.alias: dict[int, Alias] = {}
        self.hooked = False  # whether a hook may change gradients on their way
        self.batch_norms: list[tuple[Any, Hook]] = []  # those that ran in training mode: graph node, and what holds it
        self.attributes: list[Tensor] = []  # of modules, neither parameters nor buffers, that hold numbers
        known: list[Any] = [] if isinstance(model, nn.Module) else _own_parameters(model)
        for module in modules or _modules(model):
            for own in own_tensors(module):
                known += own.values()
            # Plain attributes may be constants (positions, masks), or an input that the module kept: numbers are data.
            attributes = vars(module)
            for name in attributes.keys() - OF_EVERY_MODULE:
                if isinstance(value := attributes[name], KEEPERS):
                    self._attribute(tensors(value), known)
        self.mark_clean([t for t in known if t is not None])

    def _attribute(self, found: list[Tensor], known: list[Any]) -> None:
        known += [t for t in found if not t.is_floating_point()]
        self.attributes += [t for t in found if t.is_floating_point() and not t.requires_grad]

    def mark_clean(self, things: list[Tensor]) -> None:
        """Clean until its version moves."""
        for t, at in zip(things, versions(things), strict=True):
            self.clean[id(t)] = t, at

    def __torch_function__(self, op, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.hooked = self.hooked or op is Tensor.register_hook
        inputs, clean, names, held = [], [], self.names, self.clean
        for part in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(part, Tensor):
                inputs.append(part)
            elif isinstance(part, CONTAINERS) and part:
                inputs += tensors(part)
        for t in inputs:
            if (at := id(t)) in names:
                clean.append(True)  # an optimiser's step makes no data of a parameter
            elif at in held and held[at][1] == version(t):
                clean.append(True)
            else:  # a number holds no samples, wherever it comes from
                clean.append(t.dim() == 0 and not t.requires_grad)
        if inputs and True not in clean and op is not F.batch_norm:  # data alone
            z = op(*args, **kwargs)
            self.handed_in.note(op, inputs, z)
            return z
        before = versions(inputs)
        weights, below, mixes, all_clean = [], [], False, False not in clean
        if torch.is_grad_enabled():
            for t, c in zip(inputs, clean, strict=True):
                if t.requires_grad:
                    (weights if c else below).append(t)
            mixes = bool(weights) and not all_clean and op not in STRETCHES
            if weights and (inner := lowered(op)) is not None:
                with self:
                    z = inner(*args, **kwargs)
                if z is not NotImplemented:
                    return z
        below = [t.grad_fn or get_gradient_edge(t).node for t in below] if mixes and below else []
        z = op(*args, **kwargs)
        self.handed_in.note(op, inputs, z)
        # of a weight that is standardised by a batch norm no samples are mixed
        if op is F.batch_norm and not all_clean and uses_batch_statistics(args, kwargs) and z.requires_grad:
            self.batch_norms.append((z.grad_fn, constant_statistics(args, kwargs)))
        if all_clean or (op in STRETCHES and clean[0]):
            self._note_clean(op, args, kwargs, inputs, clean, before, weights, z)
        elif mixes and isinstance(z, Tensor) and z.requires_grad:
            if is_view(z):
                z = _unshared(z, inputs)
            still = _unmoved(inputs, before)
            if len(still) == len(inputs) or op in HARMLESS:  # the completeness walk finds what other calls hide
                self.calls.append(_call(op, args, kwargs, z, weights, below, still))
                if self.noted is not None:
                    with DisableTorchFunction():
                        self.noted(self.calls[-1], z)
        return z

    @contextmanager
    def statistics_held(self, held: bool) -> Iterator[None]:
        """Pulls inside the block pass batch norms in training mode as if their statistics were constants."""
        hooks = [node.register_hook(hook) for node, hook in self.batch_norms] if held else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note_clean(self, op, args, kwargs, inputs, clean, before, weights, z) -> None:
        still = _unmoved(inputs, before)
        if len(still) < len(inputs):
            for t, c, b in zip(inputs, clean, before, strict=True):
                if c and version(t) != b:  # changed in place by clean values
                    self.mark_clean([t])
                    self.alias.pop(id(t), None)
        results = tensors(z)
        self.mark_clean(results)
        if not weights:
            return
        if op in RULES and len(still) == len(inputs) and isinstance(z, Tensor) and z.requires_grad:
            w = weights[0]
            # else the step before serves as well
            if w.is_leaf or z.shape != w.shape or any(t is not w for t in weights):
                self.candidates.append(_call(op, args, kwargs, z, weights, [], still))
        for result in results:
            if not any(result is t for t in inputs) and result.requires_grad:
                found = alias_of(op, args, kwargs, result, self.alias)
                if found is not None:
                    self.alias[id(result)] = found
