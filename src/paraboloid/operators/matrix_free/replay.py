"""A model on its data, the same on every pass: batches, random masks, and graphs that are kept while they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from paraboloid.data.batches import Data, Output
from paraboloid.losses import Loss, LossFunction, Opaque
from paraboloid.operators.matrix_free.batching import Batching
from paraboloid.operators.matrix_free.certificate import Certificate
from paraboloid.operators.matrix_free.jacobian_rows import by_engine, by_pulls
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.second_order_passes import Autocast, TwiceDifferentiable, undisturbed
from paraboloid.passes import trees
from paraboloid.passes.autograd_walks import depends
from paraboloid.passes.frozen_encoders import fused_as_usual
from paraboloid.passes.memory import RECORDINGS
from paraboloid.passes.torch_internals import (
    DispatchMode,
    StorageWeakRef,
    flops_of,
    storage_place,
    tree_leaves,
    version,
)
from paraboloid.passes.wrappers import innermost
from paraboloid.quantities.over_data import Passes

T = TypeVar("T")


class Graph(Protocol):
    """One batch, recorded for derivatives of its unreduced loss."""

    def prepare(self) -> None:
        """Record what products need, if that is not done yet."""
        ...

    def gradient(self) -> list[Tensor]:
        """The gradient of the unreduced loss, one tensor for each parameter."""
        ...

    def product(self, v: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        """The unreduced matrix times v, within a block of parameters."""
        ...

    def adjoint_pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Two numbers that are equal if the derivatives are right, and their scale."""
        ...


def _is_dense(t: Tensor) -> bool:
    """Whether most of some hundred elements are not zero."""
    some = t[:: max(1, len(t) // 100)]
    return bool(some.count_nonzero() > len(some) / 2)


def as_loss(loss_fn: LossFunction) -> Loss:
    """The loss as a `Loss`; a callable that paraboloid does not know becomes an `Opaque` one."""
    try:
        return Loss.from_torch(loss_fn)
    except TypeError:
        return Opaque(loss_fn)


@contextmanager
def differentiated_twice(
    model: Any, autocast: Autocast, inside: Callable[[], AbstractContextManager[T]]
) -> Iterator[T]:
    """Of a forward pass that will be differentiated twice."""
    with undisturbed(model), fused_as_usual(model), TwiceDifferentiable(), autocast(), inside() as given:
        yield given


class Replay(Passes[Any]):
    """One graph for each batch of the data: ``with replay.graphs() as graphs``, again and again.

    The first pass is made at once.  If all graphs fit into `max_memory` bytes they are kept and the data is not read
    again.  Else none is: each pass reads the data and records anew.

    A graph is made from output, targets, loss, parameters and the batch's place in the pass.  With `ordered` it depends
    on which sample comes where.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: LossFunction,
        data: Data,
        graph: Callable[[Tensor, Any, Loss, list[Tensor], int], Graph],  # output, targets, ..., place in the pass
        *,
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
        ordered: bool = False,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.max_memory = RECORDINGS.of(max_memory)
        model = innermost(model)
        self.autocast = Autocast(next(iter(trees.parameters(model).values())).device)
        around = partial(differentiated_twice, model, self.autocast, inside)
        instead = f", or let the graphs fit into max_memory (now {self.max_memory} bytes), so that one pass is enough"
        super().__init__(
            model, as_loss(loss_fn), data, around, output=output, seed=seed, ordered=ordered, instead=instead
        )  # fmt: skip
        self.graph = graph
        self.versions = self._versions()
        self.certificate = Certificate(type(self.model).__name__, list(self.parameters.values()), self.autocast.enabled)
        self.rows: list[Tensor] | None = None  # of every kept graph's Jacobian, where they are needed
        self.by_rows = False
        self.size, self.flops = 0, 0  # bytes of the kept graphs, floating-point operations of their forward passes
        self.kept: list[Any] | None = []
        self.batching: Batching | None = None
        self._first_pass()

    @property
    def value(self) -> float:
        """The loss as reduced over all batches."""
        return self.total / self.normalizer

    def gradient(self) -> list[Tensor]:
        """The gradient of the loss as reduced, one tensor for each parameter."""
        with self.graphs() as graphs:
            sums = [torch.zeros_like(p) for p in self.parameters.values()]
            for graph in graphs:
                for s, g in zip(sums, graph.gradient(), strict=True):
                    s.add_(g, alpha=1 / self.normalizer)
        return [s.detach() for s in sums]

    @contextmanager
    def graphs(self) -> Iterator[Iterable[Any]]:
        """The graphs of one pass, to be used inside the block."""
        self.check_unchanged()
        with undisturbed(self.model):
            yield self._graphs() if self.kept is None else self.kept

    def check_unchanged(self) -> None:
        """Raise RuntimeError if a parameter was changed since this was made."""
        for name, made, now in zip(self.parameters, self.versions, self._versions(), strict=True):
            if made != now:
                raise RuntimeError(f"parameter {name!r} has changed since this operator was made, whose curvature is "
                                   "that at the old parameters. Make a new one.")  # fmt: skip

    def _graphs(self) -> Iterator[Any]:
        for index, (_, f, y) in enumerate(self):
            yield self._made(f, y, index)

    def _made(self, f: Tensor, y: Any, index: int) -> Graph:
        f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
        graph = self.graph(f, y, self.loss, list(self.parameters.values()), index)
        if isinstance(graph, OutputGraph):
            graph.made_rows = WeakMethod(self._rows_of)  # no circle: graphs go at once with their operator
            if self.by_rows:
                graph.take_rows()
        return graph

    def _rows_of(self, graph: OutputGraph) -> Tensor:
        """J of a graph, row by row: by the engine for all kept graphs at once, or for itself."""
        first, self.by_rows = not self.by_rows, True
        parameters, most = list(self.parameters.values()), max(self.max_memory, RECORDINGS.default)
        if self.kept and first:
            counts = [kept.f.numel() for kept in self.kept]
            self.rows = by_engine(self.model, self.recorded, counts, most)
        if self.rows is not None and self.kept:
            for kept, rows in zip(self.kept, self.rows, strict=True):
                kept.rows = rows
            return self.rows[graph.index]
        return by_pulls(graph.f, parameters, most)

    def _first_pass(self) -> None:
        with undisturbed(self.model):
            batches = iter(self)
            while self.kept is not None:
                with Footprint(self.parameters.values()) as footprint:
                    if (batch := next(batches, None)) is None:
                        break
                    self.flops += footprint.flops
                    footprint.counts = False
                    _, f, y = batch
                    if not f.requires_grad:
                        raise ValueError(
                            "the model's output does not depend on any parameter that requires a gradient; expected a "
                            "differentiable output. Does the model detach it, or run under no_grad?"
                        )
                    if not depends(f, self.parameters.values()):
                        raise ValueError(
                            f"the model's output does not depend on any of its own {len(self.parameters)} trainable "
                            "parameters; expected it computed with them, not with another module's, those of a "
                            "functional call, or a sharded model's whole ones."
                        )
                    self.kept.append(self._made(f, y, len(self.kept)))
                    self.kept[-1].prepare()
                    del batch, f, y
                self.size += footprint.bytes_kept()
                if self.size > self.max_memory:
                    self.kept = None
            for _ in batches:
                pass

    def product(self, graph: Graph, v: list[Tensor], block: Sequence[int]) -> list[Tensor]:
        """The graph's product with v; the first one certifies it (see `certify`)."""
        if self.certificate.given:
            return graph.product(v, block)
        # A product with a vector of many directions tells for itself whether J and J^T belong together.
        whole = len(block) == len(self.parameters)
        if not (whole and isinstance(graph, OutputGraph) and all(_is_dense(t.reshape(-1)) for t in v)):
            self.certify(graph)
            return graph.product(v, block)
        graph.check_cut()
        found, one, other, scale = graph.telling_product(v, block)
        if scale > 0:
            self.certificate.compare(graph, one, other, scale)
            return found
        self.certify(graph)  # zero and NaN tell nothing
        return graph.product(v, block)

    def together(
        self, graph: Graph, V: list[Tensor], of: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> list[Tensor] | None:
        """of(V) of a graph for vectors V [K, *shape] at once; None where one after another is to be preferred."""
        if self.kept is None or len(V[0]) < 2:
            return None
        if self.batching is None:
            one, flops = self.size // len(self.kept), self.flops // len(self.kept)
            self.batching = Batching(next(iter(self.parameters.values())), flops, one, self.max_memory)
        if self.batching.wanted:
            self.certify(graph)
        return self.batching.together(V, of)

    def certify(self, graph: Graph) -> None:
        """Raise RuntimeError where the graph's second derivatives are wrong; see `Certificate`.  Done once."""
        if not self.certificate.given:
            if isinstance(graph, OutputGraph):
                graph.check_cut()
            self.certificate.check(graph, self.elsewhere)

    @contextmanager
    def elsewhere(self, values: Sequence[Tensor]) -> Iterator[Graph]:
        """The first batch's graph with the parameters at other values, to be used inside the block; they are put back
        bit for bit, and what was recorded with them stays valid."""
        state, parameters = self.stream.state, list(self.parameters.values())
        before = [p.detach().clone() for p in parameters]
        try:
            for p, value in zip(parameters, values, strict=True):
                p.data.copy_(value)  # autograd does not see it: the version stays
            _, f, y = next(self._outputs(self.around))
            yield self._made(f, y, 0)
        finally:
            for p, value in zip(parameters, before, strict=True):
                p.data.copy_(value)
            self.stream.state = state

    @contextmanager
    def recorded(self, record: Callable[[], AbstractContextManager[T]]) -> Iterator[Iterator[tuple[T, Tensor, Any]]]:
        """(tape, output, targets) of each batch of one pass, its forward pass made inside ``with record() as tape``."""
        self.check_unchanged()
        with undisturbed(self.model):
            yield self.inside(partial(differentiated_twice, self.model, self.autocast, record))

    def _versions(self) -> list[tuple[int, int]]:
        return [(version(p), p.data_ptr()) for p in self.parameters.values()]


class Footprint(DispatchMode):
    """What a piece of work costs: notes every storage that operations inside produce, and counts operations.

    `bytes_kept` sums up the storages that still live.  What lives after a forward pass is what autograd saved, however
    it was saved: hooks, checkpoints and in-place operations need no special care.  Storages of `besides` (the
    parameters, whose views are outputs too) do not count.  `flops` is that of matrix products and convolutions so far,
    while `counts` is True.
    """

    def __init__(self, besides: Iterable[Tensor]):
        super().__init__()
        self.counts = True
        self.besides = {storage_place(t.untyped_storage()) for t in besides}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for t in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(t, Tensor) and t.layout == torch.strided:  # a sparse tensor's parts are results too
                storage = t.untyped_storage()
                place = storage_place(storage)
                if place not in self.besides and place not in self.seen:
                    self.seen[place] = (StorageWeakRef(storage), storage.nbytes())
        if self.counts:
            self.flops += flops_of(func, args, kwargs, result)
        return result

    def bytes_kept(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())
