"""A model on its data, the same on every pass: batches, random masks, and graphs that are kept while they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.losses import Loss, NoTargets, Opaque, settled
from paraboloid.operators.matrix_free.batching import Batching
from paraboloid.operators.matrix_free.second_order_passes import (
    Autocast,
    RandomStream,
    TwiceDifferentiable,
    undisturbed,
)
from paraboloid.passes import trees
from paraboloid.passes.footprint import Footprint
from paraboloid.passes.memory import RECORDINGS
from paraboloid.passes.torch_internals import version
from paraboloid.passes.wrappers import innermost

T = TypeVar("T")
_NO_TARGETS = (
    "every target of every batch is ignored or has zero class weight, so the mean loss is 0/0; expected at least one "
    "target that counts."
)


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


@runtime_checkable
class Telling(Protocol):
    """A graph whose products give the two numbers of `adjoint_pair` on the way."""

    def telling_product(
        self, v: Sequence[Tensor], block: Sequence[int]
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]: ...


def _is_dense(t: Tensor) -> bool:
    """Whether most of some hundred elements are not zero."""
    some = t[:: max(1, len(t) // 100)]
    return bool(some.count_nonzero() > len(some) / 2)


def as_loss(loss_fn: Any) -> Loss:
    """The loss as a `Loss`; a callable that paraboloid does not know becomes an `Opaque` one."""
    try:
        return Loss.from_torch(loss_fn)
    except TypeError:
        return Opaque(loss_fn)


class Replay:
    """One graph for each batch of the data: ``with replay.graphs() as graphs``, again and again.

    The first pass, made at once, checks outputs, targets and loss, and finds the total normalizer.  If all graphs fit
    into `max_memory` bytes they are kept and the data is not read again.  Else none is: each pass reads the data and
    records anew, and raises RuntimeError if the summed loss moved.  Masks of dropout, and whatever else draws from
    torch's global random state (a shuffling loader too), are those of `seed` on each pass.

    A graph is made from output, targets, loss, parameters and the batch's place in the pass.  With `ordered` it depends
    on which sample comes where, and RuntimeError is raised if their order moved.
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Any,
        data: Any,
        graph: Callable[[Tensor, Any, Loss, list[Tensor], int], Graph],  # output, targets, ..., place in the pass
        *,
        output: batch_data.Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
        ordered: bool = False,
        inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.parameters: dict[str, nn.Parameter] = trees.parameters(model)
        self.model, self.loss, self.output = innermost(model), as_loss(loss_fn), output
        self.data, self.graph = data, graph
        if isinstance(data, Iterator):
            raise ValueError(f"data is a {type(data).__name__}, which can be read only once; expected a batch, or what "
                             "can be iterated again, such as a list of batches or a DataLoader.")  # fmt: skip
        self.inside = inside  # of every forward pass that a graph is made from
        device = next(iter(self.parameters.values())).device
        self.stream, self.autocast = RandomStream(seed, device), Autocast(device)
        self.max_memory = RECORDINGS.of(max_memory)
        self.versions = self._versions()
        self.samples, self.normalizer, self.total = 0, 0.0, 0.0
        self.order: list[float] | None = [] if ordered else None  # of each batch, a number that follows its order
        self.certified = False  # whether autograd's second derivatives were found right, on the first batch
        self.size, self.flops = 0, 0  # bytes of the kept graphs, floating-point operations of their forward passes
        self.kept: list[Any] | None = []
        self.batching: Batching | None = None
        if len(self.loss.terms) > 1 and batch_data.as_batch(data) is None:
            self.loss = self._settled()
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
        total = 0.0
        for index, (f, y) in enumerate(self._outputs(self.inside)):
            total += self._summed_loss(f, y)
            self._check_order(f, y, index)
            yield self.graph(f, y, self.loss, list(self.parameters.values()), index)
        self._check_total(total)

    def _settled(self) -> Loss:
        """A sum of losses, each term divided by its own total over all batches: one pass to count them."""
        totals, samples = [0.0] * len(self.loss.terms), 0
        with undisturbed(self.model):
            for f, y in self._outputs():
                self.loss.check(f, y)
                samples += len(f)
                for i, term in enumerate(self.loss.terms):
                    with suppress(NoTargets):
                        totals[i] += term.normalizer(f.detach(), y)
        totals = [1.0 if t.reduction == "sum" else m for t, m in zip(self.loss.terms, totals, strict=True)]
        if min(totals) <= 0:
            raise NoTargets(_NO_TARGETS)
        return settled(self.loss, totals, samples)

    def _first_pass(self) -> None:
        with undisturbed(self.model):
            outputs = self._outputs(self.inside)
            while self.kept is not None:
                with Footprint(self.parameters.values()) as footprint:
                    if (pair := next(outputs, None)) is None:
                        break
                    self.flops += footprint.flops
                    footprint.counts = False
                    self._count(*pair)
                    self.kept.append(self.graph(*pair, self.loss, list(self.parameters.values()), len(self.kept)))
                    self.kept[-1].prepare()
                    del pair
                self.size += footprint.bytes_kept()
                if self.size > self.max_memory:
                    self.kept = None
            for f, y in outputs:
                self._count(f, y)
        if self.loss.reduction in ("sum", "whole"):
            self.normalizer = 1.0
        if self.normalizer <= 0:
            raise NoTargets(_NO_TARGETS)

    def product(self, graph: Graph, v: list[Tensor], block: Sequence[int]) -> list[Tensor]:
        """The graph's product with v; the first one certifies it (see `certify`)."""
        if self.certified:
            return graph.product(v, block)
        # A product with a vector of many directions tells for itself whether J and J^T belong together.
        if not isinstance(graph, Telling) or not all(_is_dense(t.reshape(-1)) for t in v):
            self.certify(graph)
            return graph.product(v, block)
        found, one, other, scale = graph.telling_product(v, block)
        if scale > 0:
            self._compare(one, other, scale)
        return found

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
        """Raise RuntimeError where a matrix and its transpose, as autograd has them, are not each other's transpose.

        What a wrong double backward nearly always shows.  Done once, on one batch.
        """
        if not self.certified:
            self._compare(*graph.adjoint_pair(torch.Generator(self.stream.device).manual_seed(0)))

    def _compare(self, one: Tensor, other: Tensor, scale: Tensor) -> None:
        dtype = next(iter(self.parameters.values())).dtype
        tolerance = 1e-6 if dtype == torch.float64 else 2e-2
        self.certified = bool(abs(one - other) <= tolerance * scale)
        if not self.certified:
            raise RuntimeError(
                f"autograd's second derivative of {type(self.model).__name__} is wrong: two numbers that must be "
                f"equal are {one.item():.6g} and {other.item():.6g}. Some operation of the model has no correct double "
                "backward (a custom autograd.Function, a fused kernel); write it out in plain torch operations."
            )

    @contextmanager
    def recorded(self, record: Callable[[], AbstractContextManager[T]]) -> Iterator[Iterator[tuple[T, Tensor, Any]]]:
        """(tape, output, targets) of each batch of one pass, its forward pass made inside ``with record() as tape``."""
        self.check_unchanged()
        with undisturbed(self.model):
            yield self._tapes(record)

    def _tapes(self, record: Callable[[], AbstractContextManager[T]]) -> Iterator[tuple[T, Tensor, Any]]:
        tapes: list[T] = []

        @contextmanager
        def inside() -> Iterator[None]:
            with record() as tape:
                tapes.append(tape)
                yield

        total = 0.0
        for index, (f, y) in enumerate(self._outputs(inside)):
            total += self._summed_loss(f, y)
            self._check_order(f, y, index)
            yield tapes.pop(), f, y
        self._check_total(total)

    def _outputs(self, inside: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[tuple[Tensor, Any]]:
        """(output, targets) of each batch in one pass; the output is part of a graph, and at least float32."""
        self.stream.rewind()
        iterator = batch_data.batches(self.data)
        while True:
            with self.stream:
                batch = next(iterator, None)
            if batch is None:
                return
            inputs, y = batch
            with self.stream, undisturbed(self.model), TwiceDifferentiable(), self.autocast(), inside():
                f = batch_data.call(self.model, inputs, self.output)
            if f.dtype in (torch.float16, torch.bfloat16):
                f = f.float()
            del batch, inputs
            yield f, y

    def _count(self, f: Tensor, y: Any) -> None:
        """Check a batch at the door and add it to the totals."""
        self.loss.check(f, y)
        if not f.requires_grad:
            raise ValueError("the model's output does not depend on any parameter that requires a gradient; expected a "
                             "differentiable output. Does the model detach it, or run under no_grad?")  # fmt: skip
        if self.samples and self.loss.reduction == "whole":
            raise ValueError("the loss is a plain callable, which does not tell how it divides, and the data has "
                             "several batches; expected one batch, a callable with .reduction == 'sum', a torch loss "
                             "module that paraboloid knows, or a subclass of pb.Loss.")  # fmt: skip
        self.samples += len(f) if f.dim() else 1
        with suppress(NoTargets):  # such a batch adds nothing to the sums over a loader
            self.normalizer += self.loss.normalizer(f, y)
        self.total += self._summed_loss(f, y)
        if self.order is not None:
            self.order.append(self._order_of(f, y))

    def _summed_loss(self, f: Tensor, y: Any) -> float:
        return batch_data.check_finite(self.loss.sample_losses(f, y).detach().sum()).item()

    def _order_of(self, f: Tensor, y: Any) -> float:
        losses = self.loss.sample_losses(f, y).detach()
        return (losses * torch.linspace(1, 2, len(losses), dtype=losses.dtype, device=losses.device)).sum().item()

    def _check_order(self, f: Tensor, y: Any, index: int) -> None:
        if self.order is None:
            return
        found = self._order_of(f, y)
        expected = self.order[index] if index < len(self.order) else 0.0
        dtype = next(iter(self.parameters.values())).dtype
        if abs(found - expected) > torch.finfo(dtype).eps ** 0.75 * max(abs(found), abs(expected)):
            raise RuntimeError(
                f"batch {index} does not hold the samples of the first pass in their order, to which the drawn labels "
                "belong; expected the same batches on each pass. Turn shuffling off, or let the graphs fit into "
                f"max_memory (now {self.max_memory} bytes), so that one pass is enough."
            )

    def _versions(self) -> list[tuple[int, int]]:
        return [(version(p), p.data_ptr()) for p in self.parameters.values()]

    def _check_total(self, total: float) -> None:
        dtype = next(iter(self.parameters.values())).dtype
        if abs(total - self.total) > torch.finfo(dtype).eps ** 0.75 * abs(self.total):
            raise RuntimeError(
                f"the summed loss moved from {self.total:.8g} to {total:.8g} between two passes over the data, so the "
                "passes do not see one function; expected the same samples and values on each pass. Turn random "
                "augmentation, drop_last with shuffling, and changes of mode or parameters off, or let the graphs fit "
                f"into max_memory (now {self.max_memory} bytes), so that one pass is enough."
            )
