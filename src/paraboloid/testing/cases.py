"""A case of a rule: the arguments of one call in float64, what is a weight in them, and the call in other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from paraboloid.layers import LOWERINGS, RULES

LARGEST = 8  # samples, of the sizes that are tried besides the given one


@dataclass(frozen=True)
class Case:
    """One call op(*args, **kwargs) by its tensors: the `roots` are its parameters and `data` the rest.

    `args` and `kwargs` hold a `Slot` in the place of every tensor.
    """

    op: Callable
    args: Any
    kwargs: Any
    tensors: list[Tensor]  # by slot; of a weight that is expanded, the parameter itself
    weights: dict[int, torch.Size]  # slot of a weight -> the shape it is expanded to
    labels: list[str]
    title: str
    variant: str = ""
    generated: bool = False

    @property
    def name(self) -> str:
        return f"{self.title}{self.variant}"

    @property
    def roots(self) -> dict[int, Tensor]:
        return {i: self.tensors[i] for i in self.weights}

    @property
    def data(self) -> dict[int, Tensor]:
        return {i: t for i, t in enumerate(self.tensors) if i not in self.weights}

    def call(self, tensors: list[Tensor], run: Callable | None = None) -> Any:
        """The operation (or `run` on its arguments) with other tensors in the slots."""
        return (run or self.op)(*_filled(self.args, tensors), **_filled(self.kwargs, tensors))

    def arguments(self) -> list[Tensor]:
        """Fresh tensors for the slots: copies of the data, and the weights as the call takes them."""
        return [
            t.expand(self.weights[i]) if i in self.weights and self.weights[i] != t.shape
            else t if i in self.weights else _copy(t) for i, t in enumerate(self.tensors)
        ]  # fmt: skip

    def output(self) -> Tensor:
        return first(self.call(self.arguments()))

    # --- the same call in other forms ---------------------------------------------------------------------------------

    def strided(self) -> Case:
        """With tensors whose entries do not lie side by side."""
        tensors = [_strided(t, i in self.weights) for i, t in enumerate(self.tensors)]
        return replace(self, tensors=tensors, variant=f"{self.variant}, not contiguous")

    def axes_along(self, axis: int) -> dict[int, int] | None:
        """Slot of a data tensor -> its axis that runs along `axis` of the output; None where samples there are not
        apart in the data, or where another argument depends on their number."""
        z = self.output()
        size = z.shape[axis]
        slots = [i for i, t in self.data.items() if t.dim()]
        options = [[*(a for a, d in enumerate(self.tensors[i].shape) if d == size), None] for i in slots]
        for choice in islice(product(*options), 64):
            along = {i: a for i, a in zip(slots, choice, strict=True) if a is not None}
            if along and all(self._selects(along, axis, n, z) for n in {0, size - 1}):
                return along
        return None

    def _selects(self, along: dict[int, int], axis: int, n: int, z: Tensor) -> bool:
        try:
            alone = self.selected(along, torch.tensor([n])).output()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False
        expected = z.narrow(axis, n, 1)
        return alone.shape == expected.shape and torch.allclose(alone, expected, rtol=1e-9, atol=1e-12)

    def selected(self, along: dict[int, int], samples: Tensor) -> Case:
        tensors = [t.index_select(along[i], samples) if i in along else t for i, t in enumerate(self.tensors)]
        return replace(self, tensors=tensors)

    def sizes(self, axis: int, along: dict[int, int] | None) -> Iterator[Case]:
        """The same with one sample, and with as many as there are positions along another axis."""
        if along is None or self.generated:
            return
        shape = self.output().shape
        others = {d for i, d in enumerate(shape) if i != axis and d <= LARGEST}
        one = {1} if axis == 0 else set()  # elsewhere the engine takes axis 0 for that of the one sample
        for size in sorted({*one, *sorted(others)[-1:]} - {shape[axis]}):
            yield self.selected(along, torch.arange(size) % shape[axis])


@dataclass(frozen=True)
class Slot:
    place: int


@dataclass
class _Reader:
    tensors: list[Tensor] = field(default_factory=list)
    weights: dict[int, torch.Size] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    seen: dict[int, Slot] = field(default_factory=dict)

    def read(self, value: Any, label: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.seen:
                self.seen[id(value)] = Slot(len(self.tensors))
                self.labels.append(label)
                self.tensors.append(self._own(value))
            return self.seen[id(value)]
        if isinstance(value, tuple | list):
            return type(value)(self.read(v, f"{label}[{i}]") for i, v in enumerate(value))
        return value

    def _own(self, t: Tensor) -> Tensor:
        own = t.detach().double() if t.is_floating_point() else t.detach()
        if not t.requires_grad:
            return _copy(own)
        self.weights[len(self.tensors)] = t.shape
        for axis, step in enumerate(t.stride()):
            own = own.narrow(axis, 0, 1) if step == 0 else own
        return _copy(own).requires_grad_()


def read(op: Callable, cases: Any) -> Iterator[Case]:
    """The cases as a user gives them; raises ValueError for what is none."""
    for i, given in enumerate(cases):
        if callable(given) and not isinstance(given, Tensor):
            sized = bool(inspect.signature(given).parameters)
            for made in [given(n) for n in (3, 1, 2)] if sized else [given()]:
                yield _case(op, made, f"case {i}", sized)
        else:
            yield _case(op, given, f"case {i}", False)


def _case(op: Callable, given: Any, title: str, generated: bool) -> Case:
    if not isinstance(given, tuple | list):
        raise ValueError(f"{title} is a {type(given).__name__}; expected a tuple of the arguments of {named(op)}, a "
                         "pair (arguments, keywords), or a function that makes one of these.")  # fmt: skip
    pair = len(given) == 2 and isinstance(given[0], tuple | list) and isinstance(given[1], dict)
    args, kwargs = given if pair else (given, {})
    reader, names = _Reader(), _names(RULES.get(op) or LOWERINGS.get(op), len(args))
    args = [reader.read(a, name) for a, name in zip(args, names, strict=True)]
    kwargs = {k: reader.read(v, k) for k, v in kwargs.items()}
    shapes = ", ".join(f"{label} {list(t.shape)}" for label, t in zip(reader.labels, reader.tensors, strict=True))
    title = f"{named(op)}, {title} ({shapes})"
    if not reader.weights:
        raise ValueError(f"{title} has no weight; expected at least one tensor that requires grad (an nn.Parameter).")
    return Case(op, args, kwargs, reader.tensors, reader.weights, reader.labels, title, generated=generated)


def named(op: Callable) -> str:
    return resolve_name(op) or getattr(op, "__name__", str(op))


def first(z: Any) -> Tensor:
    """The output, or the first of several."""
    while isinstance(z, tuple | list):
        z = z[0]
    return z


def _names(function: Callable | None, count: int) -> list[str]:
    """What the positional arguments are called."""
    names = []
    for name, p in inspect.signature(function).parameters.items() if function is not None else ():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{name}[{i}]" for i in range(count - len(names))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return [*names, *(f"argument {i}" for i in range(len(names), count))][:count]


def _filled(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, Slot):
        return tensors[tree.place]
    if isinstance(tree, dict):
        return {k: _filled(v, tensors) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_filled(v, tensors) for v in tree)
    return tree


def _copy(t: Tensor) -> Tensor:
    """A copy that lies in memory as t does."""
    return t.clone() if 0 in t.stride() else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def _strided(t: Tensor, weight: bool) -> Tensor:
    if t.dim() < 2:
        return t
    wide = t.detach().new_zeros(*t.shape, 2)
    wide[..., 0] = t.detach()
    return nn.Parameter(wide[..., 0]) if weight else wide[..., 0]
