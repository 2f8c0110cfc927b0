"""The public door to everything that one forward pass and a few pulls give besides the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.distributed import collectives
from paraboloid.engine.tape import Tape
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.losses import Loss
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.passes.memory import GRADIENTS, INPUTS
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.random_state import isolated
from paraboloid.passes.torch_internals import DisableTorchFunction
from paraboloid.passes.wrappers import unwrapped
from paraboloid.quantities.named import GRADIENT, Group, Quantity, Scale, Source, check_samples, resolve
from paraboloid.quantities.over_ranks import Values, check_summable, combine
from paraboloid.reductions.products import keep_inputs, merge
from paraboloid.reductions.recent import Recent
from paraboloid.reductions.sums import reduce


class Statistics(Mapping[str, dict[str, Any]]):
    """quantity -> parameter name -> value; with the loss as reduced and the model's output, detached.

    `samples` is the number of samples N and `normalizer` what the loss divides by (N for a plain mean, 1 for a sum);
    with `all_reduce` both are those of all ranks, like the loss.
    """

    def __init__(self, values: dict[str, dict[str, Any]], loss: Tensor, output: Tensor, scale: Scale):
        self._values, self.loss, self.output = values, loss, output
        self.samples, self.normalizer = scale.N, 1 / scale.a

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._values:
            raise KeyError(f"{name!r} was not asked for; available: {list(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def total(self, name: str) -> Tensor:
        """Sum over parameters, for values whose shape does not depend on the parameter (square_norms, gram)."""
        values = list(self[name].values())
        if not all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values) or name not in TOTALS:
            raise ValueError(f"{name!r} has a value of its own shape for every parameter, so there is no total; totals "
                             f"exist for {sorted(TOTALS)}.")  # fmt: skip
        return torch.stack(values).sum(0)

    def __repr__(self) -> str:
        return f"Statistics({list(self._values)}, loss={float(self.loss):.6g})"


TOTALS = {"square_norms", "gram"}


class Recording(Tape):
    """A tape with the statistics of what it recorded."""

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
        all_reduce: Any = False,
    ) -> Statistics:
        """Quantities of the recorded forward pass; see `statistics`.

        Before ``loss.backward()``, or after it with ``retain_graph=True``.
        """
        loss = Loss.from_torch(loss_fn)
        wanted = resolve(quantities)
        if (group := collectives.group_of(all_reduce)) is not None:
            check_summable(wanted)
        with DisableTorchFunction(), own_arithmetic(output.device):
            loss.check(output, target)
            if group is None:
                check_samples(wanted, len(output))
                scale = Scale(len(output), 1 / loss.normalizer(output, target))
                value = batch_data.check_finite(loss.value(full(output), target))
            wanted = [q.bound(self, loss, output, target, max_memory) for q in wanted]
            if generator is None:
                generator = torch.Generator(device=output.device).manual_seed(collectives.rank_seed(seed, group))
            by_source: dict[Source, list[Quantity]] = {}
            for q in wanted:
                by_source.setdefault(q.source, []).append(q)
            if accumulate_grad:
                by_source.setdefault(GRADIENT, [])
            mixed = not any(q.per_sample for q in wanted)
            results: dict[str, dict[str, Any]] = {q.name: {} for q in wanted}
            gradient: dict[str, Tensor | None] = {}  # of the unreduced loss, if it is to be accumulated
            for source, sharing in by_source.items():
                vectors = output_vectors(loss, output, target, source, generator)
                totals = gradient if accumulate_grad and source == GRADIENT else None
                found = self._reduce(output, vectors, sharing, totals, max_memory, mixed)
                results |= found if group is not None else {q.name: self._finished(q, found, scale) for q in sharing}
            if group is not None:
                batch = combine(wanted, results, gradient, self.parameters, loss, output, target, group)
                scale, value, gradient = batch.scale, batch_data.check_finite(batch.loss), batch.gradient
                check_samples(wanted, scale.N)
                results = {q.name: self._finished(q, batch.values, scale, combined=True) for q in wanted}
            if accumulate_grad:
                wrapper = collectives.wrapper_group(self.model) if group is None else None
                self._accumulate(gradient, scale.a, wrapper)
        return Statistics(results, value, output.detach(), scale)

    def of_vectors(
        self, output: Tensor, vectors: Iterable[Tensor], quantity: Quantity, max_memory: int | None = None
    ) -> dict[str, Any]:
        """A quantity of given vectors in output space in the place of its own, by parameter name; with the factor 1."""
        with DisableTorchFunction(), own_arithmetic(output.device):
            found = self._reduce(output, iter(vectors), [quantity], None, max_memory, not quantity.per_sample)
            return self._finished(quantity, found, Scale(len(output), 1.0))

    @torch.no_grad()
    def _finished(self, q: Quantity, running: Values, scale: Scale, combined: bool = False) -> dict[str, Any]:
        if combined and q.over_ranks == "finished":
            return {k: scale.a * v for k, v in running[q.name].items()}
        values = {k: _as_parameter(q.finish(v, scale), self.parameters[k]) for k, v in running[q.name].items()}
        return q.complete(values, scale)

    def _reduce(self, f, vectors, quantities, totals, max_memory, mixed) -> Values:
        """The running values after all vectors; autograd's own gradient is added to `totals` if given."""
        running: Values = {q.name: dict.fromkeys(self.parameters) for q in quantities}
        needs = frozenset[str]().union(*(q.needs for q in quantities))
        size = sum(c.shape.numel() for c in self.calls) * f.element_size()
        count = GRADIENTS.count(size, max_memory, f.device)
        vs, kept = list(islice(vectors, count)), []
        while vs:
            following = list(islice(vectors, count))
            outers = self.pull(f, torch.stack(vs) if len(vs) > 1 else vs[0][None], totals, batch_statistics=mixed)
            if following and needs and not kept:
                every = (o for uses in outers.values() for o in uses)
                kept = keep_inputs(every, INPUTS.of(max_memory))
            vs = following
            recent = Recent()
            with torch.no_grad():
                for name in self.parameters:
                    o = merge(outers.pop(name))
                    group = Group(reduce(o, needs, max_memory, recent), o, max_memory, name, recent)
                    held: set[int] = set()
                    for q in quantities:
                        try:
                            before = running[q.name][name]
                            value = q.add(before, group)
                            running[q.name][name] = _owned(value, held) if before is None else value
                        except NotImplementedError as e:
                            raise NotImplementedError(f"{q.name!r}: parameter {name!r} {e}") from None
        for right in kept:
            right.forget()
        return running

    @torch.no_grad()
    def _accumulate(self, gradient: Mapping[str, Tensor | None], a: float, wrapper: Any) -> None:
        """Add a times the gradient to `.grad`; averaged over a data-parallel wrapper's group, as backward() does."""
        if wrapper is not None:
            gradient, a = collectives.averaged(gradient, self.parameters, a, wrapper), 1.0
        for name, p in self.parameters.items():
            if (g := gradient[name]) is not None:
                p.grad = a * g if p.grad is None else p.grad.add_(g, alpha=a)


def _owned(value: Any, held: set[int]) -> Any:
    """A first running value as the quantity's own, to be changed in place: what another one took is copied."""

    def own(t: Tensor) -> Tensor:
        t = t.clone() if t.data_ptr() in held else t
        held.add(t.data_ptr())
        return t

    return trees.mapped(own, value)


def _as_parameter(value: Any, p: Tensor) -> Any:
    """A value in the parameter's type; the sums of one in half precision were kept in float32."""
    return trees.mapped(lambda t: t.to(p.dtype), value)


def output_vectors(loss: Loss, f: Tensor, y: Tensor, source: Source, generator: torch.Generator) -> Iterator[Tensor]:
    """The vectors of the output's shape that a source stands for."""
    if source.kind == "gradient":
        return iter([loss.gradient(f, y)])
    if source.kind == "root":
        return loss.hessian_root(f, y)
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


def statistics(
    model: nn.Module,
    loss_fn: nn.Module | Loss,
    batch: Any,
    quantities: Iterable[str | Quantity] | str | Quantity,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
    accumulate_grad: bool = False,
    all_reduce: Any = False,
    output: batch_data.Output | None = None,
    verify: str | bool = "auto",
) -> Statistics:
    """More than the gradient of one batch, from one forward pass and the fewest pulls.

    model            any nn.Module; only parameters with requires_grad take part
    loss_fn          CrossEntropyLoss, MSELoss, BCEWithLogitsLoss (all options, mean or sum) or a `pb.Loss`
    batch            (inputs, targets), or a dict with "labels"
    quantities       names ("grad", "variance", "kfac", ...) or objects of `pb.quantities`; scalings are theirs
    seed, generator  for sampled labels, and for dropout in a model that is in training mode
    max_memory       bytes, an upper aim for temporary memory; the smallest chunk never raises
    accumulate_grad  also add the gradient of the loss to `.grad`, as backward() would
    all_reduce       True or a `torch.distributed` process group: quantities, loss and accumulated gradient are those of
                     one big batch, the samples of all ranks together, whatever the number of each; per-sample ones
                     (sample_grads, square_norms, gram, sqrt_ggn, ...) stay those of this rank.  All ranks must call
    output           picks the output tensor from a structured result, e.g. ``lambda o: o.logits``
    verify           how often sample independence is certified by numbers (two extra pulls): "auto" (when a sequence
                     of calls and shapes is first seen, on its calls 2, 4, 8, ..., and wherever the graph alone is no
                     proof), "once" (not on calls 2, 4, ...), "always" or False

    Returns `Statistics`: ``stats["variance"]["conv1.weight"]``, ``stats.loss``, ``stats.output``,
    ``stats.total(name)``.

    Raises ValueError for inputs that do not fit (the message says which and what was expected), and where the samples
    are not independent; NotImplementedError for Kronecker factors of a parameter that has none.
    Sources: BackPACK, arXiv:1912.10985; for each quantity see its class.
    """
    if (pair := batch_data.as_batch(batch)) is None:
        raise ValueError(f"batch is a {type(batch).__name__}; expected (inputs, targets) or a dict with 'labels'.")
    inputs, target = pair
    with isolated(model, target.device, collectives.rank_seed(seed, collectives.group_of(all_reduce))):
        twice = twice_differentiable() if any(q.twice for q in resolve(quantities)) else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), record(model, verify) as tape, twice:
            f = batch_data.call(unwrapped(model), inputs, output)
        return tape.statistics(
            loss_fn, f, target, quantities, seed=seed, generator=generator, max_memory=max_memory,
            accumulate_grad=accumulate_grad, all_reduce=all_reduce,
        )  # fmt: skip
