"""A recorded forward pass with the statistics of what it recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Inputs, Output
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import AllReduce
from paraboloid.distributed.collectives import Group as Ranks
from paraboloid.engine.tape import Tape
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.losses import Loss
from paraboloid.losses.leading_root import LeadingRoot
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.passes.memory import COPIES, GRADIENTS, INPUTS
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.random_state import copied_buffers, isolated_with_gradients
from paraboloid.passes.tensor_hooks import unhooked
from paraboloid.passes.torch_internals import DisableTorchFunction, EnableTorchFunction, changes_inputs
from paraboloid.passes.wrappers import unwrapped
from paraboloid.quantities import copies
from paraboloid.quantities.copies import Again
from paraboloid.quantities.named import check_samples, resolve
from paraboloid.quantities.quantity import GRADIENT, NOTHING, Group, Quantity, Scale, Source
from paraboloid.quantities.result import Statistics, concluded, finished, of_sums
from paraboloid.quantities.sums import Gradient, LeftOut, Sums, Values, check_summable, normalizers
from paraboloid.reductions.outer import EVERYTHING, Outer
from paraboloid.reductions.products import keep_inputs, merge
from paraboloid.reductions.sums import Recent, reduce

_AS_IT_IS = nullcontext()


class Recording(Tape):
    """A tape with the statistics of what it recorded."""

    def __init__(self, model: nn.Module, verify: str | bool = "auto", modules: list[nn.Module] | None = None):
        super().__init__(model, verify, modules)
        self.room = 0  # bytes of pulled-back vectors that are kept, for the same source to be asked for again
        self.pulled: dict[Source, list[dict[str, list[Outer]]]] = {}
        self.left_out: LeftOut = {}  # of the latest running values
        self.again: Again | None = None  # records the model on some of the samples
        self.together = GRADIENTS  # the limit of what is pulled at a time
        self.by_rows = False  # whether rows of layers may take the place of samples that see each other
        self.some = EVERYTHING  # samples that are pulled back now, where each is by itself

    def runs_again(
        self, model: nn.Module, inputs: Inputs, device: torch.device, seed: int, output: Output | None, f: Tensor
    ) -> None:  # fmt: skip
        """How what is recorded came about, for the model to run on copies of some of the samples of f."""
        N, verify = len(f) if f.dim() else 1, self.verify

        def again(samples: Tensor) -> AbstractContextManager[tuple[Recording, Tensor]]:
            return forward(model, copies.taken(inputs, samples, N), device, seed, output, verify)

        self.again = again

    def statistics(
        self,
        loss_fn: nn.Module | Loss,
        output: Tensor,
        target: Tensor,
        quantities: Iterable[str | Quantity] | str | Quantity,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
        max_memory: int | None = None,
        accumulate_grad: bool = False,
        all_reduce: AllReduce = False,
        tol: float = 0.0,
    ) -> Statistics:
        """Quantities of the recorded forward pass; see `statistics`.

        Before ``loss.backward()``, or after it with ``retain_graph=True``.
        """
        wanted, group = resolve(quantities, tol), collectives.group_of(all_reduce)
        return self.resolved(loss_fn, output, target, wanted, seed, generator, max_memory, accumulate_grad, group)

    def resolved(
        self, loss_fn: nn.Module | Loss, f: Tensor, y: Tensor, wanted: list[Quantity], seed: int,
        generator: torch.Generator | None, max_memory: int | None, accumulate: bool, group: Ranks,
    ) -> Statistics:  # fmt: skip
        """The same for quantities as objects."""
        loss = Loss.from_torch(loss_fn)
        with DisableTorchFunction(), own_arithmetic(f.device):
            loss.check(f, y)
            if generator is None:
                generator = torch.Generator(f.device).manual_seed(collectives.rank_seed(seed, group))
            if group is not None:
                check_summable(wanted)
                sums = self.sums(loss, f, y, wanted, generator, max_memory, accumulate)
                return of_sums(self.model, self.parameters, wanted, loss, sums, [f], accumulate, group)
            check_samples(wanted, len(f))
            scale = Scale(len(f), 1 / loss.normalizer(f, y))
            value = batch_data.check_finite(loss.value(full(f), y))
            values, gradient = self.running(loss, f, y, wanted, generator, max_memory, accumulate)
            totals = gradient if accumulate else None
            return concluded(
                self.model, self.parameters, wanted, values, totals, scale, value, f.detach(), self.left_out
            )  # fmt: skip

    def sums(
        self, loss: Loss, f: Tensor, y: Tensor, quantities: Iterable[Quantity], generator: torch.Generator,
        max_memory: int | None = None, accumulate: bool = False, total: float | None = None,
    ) -> Sums:  # fmt: skip
        """What this batch adds up to; `total`: of the unreduced loss, where it is known or does not matter."""
        with DisableTorchFunction(), own_arithmetic(f.device):
            loss.check(f, y)
            values, gradient = self.running(loss, f, y, quantities, generator, max_memory, accumulate)
            total = float(loss.sample_losses(full(f), y).sum()) if total is None else total
            return Sums(len(f), normalizers(loss, f, y), total, values, gradient, self.left_out)

    def running(
        self, loss: Loss, f: Tensor, y: Tensor, quantities: Iterable[Quantity], generator: torch.Generator,
        max_memory: int | None = None, accumulate: bool = False,
    ) -> tuple[Values, Gradient]:  # fmt: skip
        """The running values of this batch, and with `accumulate` the gradient of the unreduced loss."""
        with copied_buffers(self.model, self.modules), unhooked(self.parameters.values()):
            return self._running(loss, f, y, quantities, generator, max_memory, accumulate)

    def _running(self, loss, f, y, quantities, generator, max_memory, accumulate) -> tuple[Values, Gradient]:
        by_source: dict[Source, list[Quantity]] = {}
        mixed, values, gradient = True, Values(), Gradient()
        quantities = _bound(quantities, self, loss, f, y, max_memory)
        for q in quantities:
            by_source.setdefault(q.source, []).append(q)
            mixed = mixed and not q.per_sample
            values[q.name] = {}
        if accumulate:
            by_source.setdefault(GRADIENT, [])
        self.by_rows = True
        for q in quantities:
            self.by_rows = self.by_rows and q.by_rows
        completed = Values()
        self.left_out = {}
        for source, sharing in by_source.items():
            vectors = output_vectors(loss, f, y, source, generator)
            if isinstance(vectors, LeadingRoot):
                if (found := self._of_copies(f, vectors, sharing, max_memory, mixed)) is not None:
                    values |= found
                    continue
                self.left_out |= {q.name: (vectors.left, vectors.total) for q in sharing}
                vectors = vectors.columns
            totals = gradient if accumulate and source == GRADIENT else None
            if source != NOTHING and self.plan(f, mixed, self.by_rows).apart:
                bound = partial(_bound, sharing, self, loss, f, y, max_memory)
                completed |= self._in_pieces(f, vectors, bound, totals, max_memory, mixed)
            else:
                values |= self._reduce(f, vectors, sharing, totals, max_memory, mixed, source)
        for q in quantities:
            values[q.name] = completed.get(q.name) or q.complete(values[q.name])
        return values, gradient

    def _in_pieces(self, f, vectors, quantities, totals, max_memory, mixed) -> Values:
        """The values of samples that are each pulled back by themselves, so many at a time as fit, merged as those of
        batches are; `quantities()` are bound to this batch anew for each."""
        vectors, some = list(vectors), quantities()
        each = sum(c.shape.numel() for c in self.calls) * f.element_size() * max(1, len(vectors))
        step = GRADIENTS.count(each, max_memory, f.device)
        if any(q.over_batches() is not q or q.over_ranks is None for q in some):
            step = len(f)  # it cannot be merged
        found: Values = {}
        for start in range(0, len(f), step):
            self.some = slice(start, min(start + step, len(f)))
            piece = self._reduce(f, iter(vectors), some, None if start else totals, max_memory, mixed, None)
            for q in some:
                values = q.complete(piece[q.name])
                if start:
                    values = {name: q.merge(found[q.name][name], value) for name, value in values.items()}
                found[q.name] = values
            some = quantities()
        self.some = EVERYTHING
        return found

    def _of_copies(self, f, root: LeadingRoot, quantities, max_memory, mixed) -> Values | None:
        """The running values from each sample's own number of columns; None where that does not pay, or cannot be."""
        own, again = root.own, self.again
        if own is None or again is None or self.recorder.batch_norms or not all(q.takes_copies for q in quantities):
            return None
        if self.plan(f, mixed, self.by_rows).apart:
            return None  # samples that see each other have other outputs among copies
        size = sum(c.shape.numel() for c in self.calls) * f.element_size() // len(f)
        plan = copies.planned(own.counts, root.count, max(len(f), COPIES.count(size, max_memory, f.device)))
        if plan is None:
            return None
        with EnableTorchFunction(), again(plan.samples) as (tape, outputs), DisableTorchFunction():
            if not copies.same(outputs, f, plan.samples):
                return None
            first = copies.shared_vectors(plan, own.of, len(f), f.device)
            running = self._reduce(f, first, quantities, None, max_memory, mixed, None)
            rest = copies.vectors(plan, own.of, f.device)
            tape.together = COPIES  # the same inputs for all: as few products with them as can be
            running = tape._reduce(outputs, rest, quantities, None, max_memory, mixed, None, running)
        self.left_out |= {q.name: (own.left, root.total) for q in quantities}
        return running

    def of_vectors(
        self, output: Tensor, vectors: Iterable[Tensor], quantity: Quantity, max_memory: int | None = None
    ) -> dict[str, Any]:
        """A quantity of given vectors in output space in the place of its own, by parameter name; with the factor 1."""
        unchanged = copied_buffers(self.model, self.modules), unhooked(self.parameters.values())
        with DisableTorchFunction(), own_arithmetic(output.device), unchanged[0], unchanged[1]:
            self.by_rows = quantity.by_rows
            found = self._reduce(output, iter(vectors), [quantity], None, max_memory, not quantity.per_sample, None)
            values = quantity.complete(found[quantity.name])
            return finished(quantity, values, self.parameters, Scale(len(output), 1.0))

    def _reduce(
        self, f, vectors, quantities, totals, max_memory, mixed, source, running: Values | None = None
    ) -> Values:
        """The running values after all vectors, from those before; autograd's own gradient is added to `totals`."""
        if running is None:
            running = {q.name: dict.fromkeys(self.parameters) for q in quantities}
        needs = frozenset[str]().union(*[q.needs for q in quantities])
        for outers in self.pulled.get(source) or self._groups(f, vectors, totals, max_memory, mixed, needs, source):
            recent = Recent()
            alone = len(quantities) == 1
            with torch.no_grad():
                for name in self.parameters:
                    uses = outers[name] if self.room else outers.pop(name)
                    o = uses[0] if len(uses) == 1 else merge(uses)
                    parts = reduce(o, needs, max_memory, recent) if needs else {}
                    group = Group(parts, o, max_memory, name, recent)
                    held: set[int] = set()
                    for q in quantities:
                        try:
                            before = running[q.name][name]
                            value = q.add(before, group)
                            running[q.name][name] = value if alone or before is not None else _owned(value, held)
                        except NotImplementedError as e:
                            raise NotImplementedError(f"{q.name!r}: parameter {name!r} {e}") from None
        return running

    def _groups(self, f, vectors, totals, max_memory, mixed, needs, source) -> Iterator[dict[str, list[Outer]]]:
        """The vectors pulled back, as many at a time as fit."""
        size = sum([c.shape.numel() for c in self.calls]) * f.element_size()
        count = self.together.count(size, max_memory, f.device)
        if self.plan(f, mixed, self.by_rows).apart:
            count = max(1, count // len(range(len(f))[self.some]))
        vs, inputs, seen, room = list(islice(vectors, count)), [], [], self.room
        while vs:
            following = list(islice(vectors, count))
            v = torch.stack(vs) if len(vs) > 1 else vs[0][None]
            outers = self._pull(f, v, totals, mixed, self.by_rows, self.some)
            if following and needs and not inputs:
                every = (o for uses in outers.values() for o in uses)
                inputs = keep_inputs(every, INPUTS.of(max_memory))
            room -= len(vs) * size
            if room >= 0:
                seen.append(outers)
            else:
                seen.clear()
            vs = following
            yield outers
        for right in inputs:
            right.forget()
        if seen:
            self.pulled[source] = seen


def _bound(quantities, tape: Recording, loss: Loss, f: Tensor, y: Tensor, memory: int | None) -> list[Quantity]:
    return [q.bound(tape, loss, f, y, memory) for q in quantities]


def _owned(value: Any, held: set[int]) -> Any:
    """A first running value as the quantity's own, to be changed in place: what another one took is copied."""

    def own(t: Tensor) -> Tensor:
        t = t.clone() if t.data_ptr() in held else t
        held.add(t.data_ptr())
        return t

    return trees.mapped(own, value)


def output_vectors(
    loss: Loss, f: Tensor, y: Tensor, source: Source, generator: torch.Generator
) -> Iterator[Tensor] | LeadingRoot:
    """The vectors of the output's shape that a source stands for; with a tolerance, and what they leave out."""
    if source.kind == "gradient":
        return iter([loss.gradient(f, y)])
    if source.kind == "root":
        return loss.leading_root(f, y, source.tol) if source.tol else loss.hessian_root(f, y)
    if source.kind == "nothing":
        return iter(())
    return loss.sampled_gradients(f, y, source.samples, generator)


@contextmanager
def record(model: nn.Module, verify: str | bool = "auto") -> Iterator[Recording]:
    """Record the forward passes inside the block, for quantities of your own training step.

        with pb.record(model) as tape:
            output = model(x)
        stats = tape.statistics(loss_fn, output, y, ["variance"])

    Axis 0 of the output is the sample.  Everything that consumes a trainable parameter is noted; nothing is attached to
    the model.  verify: how often the independence of the samples is certified, see `statistics`.
    """
    tape = Recording(model, verify)
    with tape.recording():
        yield tape


@contextmanager
def forward(
    model: nn.Module, inputs: Inputs, device: torch.device, seed: int, output: Output | None = None,
    verify: str | bool = "auto", twice: bool = False,
) -> Iterator[tuple[Recording, Tensor]]:  # fmt: skip
    """(recording, output) of one batch with the masks of `seed`; afterwards everything is as it was: torch's random
    state, the model's buffers, whatever mode is on around it.

    twice: whether the forward pass is differentiated twice.
    """
    modules = modules_of(model)
    with isolated_with_gradients(model, device, seed, modules):
        tape, inner = Recording(model, verify, modules), unwrapped(model)
        args, kwargs = batch_data.arguments(inputs)
        seen = None if changes_inputs(inner) else (args, kwargs)
        with tape.recording(seen), twice_differentiable() if twice else _AS_IT_IS:
            f = batch_data.picked(inner(*args, **kwargs), output)
        tape.runs_again(model, inputs, device, seed, output, f)
        yield tape, f
