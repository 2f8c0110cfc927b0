"""A quantity against what every quantity must be, and against its definition by loops of autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import as_batch, call
from paraboloid.losses import Loss
from paraboloid.losses.leading_root import LeadingRoot
from paraboloid.passes import trees
from paraboloid.quantities import ROOT, Quantity, Scale, Source, resolve
from paraboloid.quantities.door import statistics
from paraboloid.quantities.recording import Recording, output_vectors
from paraboloid.quantities.result import finished
from paraboloid.testing.comparison import check_equal, check_trees, leaves

SINGLE = 1e-3  # relative, of float32
Expected = Callable[[Tensor, Scale], Any]


def check_quantity(
    quantity: Quantity | str,
    model: nn.Module,
    loss_fn: nn.Module | Loss,
    batch: Any,
    *,
    expected: Expected | None = None,
) -> None:
    """Check a `Quantity` in what can be known without its definition, and with `expected` the value itself.

        def largest(J, scale):                         # J [V, N, *shape], of one parameter
            return J[0].abs().amax(0)

        pb.testing.check_quantity(Largest(), model, loss_fn, (inputs, targets), expected=largest)

    batch     (inputs, targets) with N >= 2 samples along axis 0; an odd number shows more
    expected  the definition: a function of one parameter's pulled-back vectors J_n^T s_vn of the *unreduced* loss,
              [V, N, *shape] (for the source GRADIENT, V = 1 and J[0] are the individual gradients), and of
              `Scale(N, a)`, the number of samples and the reduction's factor

    On a copy of the model in float64: name, source and `needs` are known ones; there is a value for each parameter, in
    its dtype (in float32 too, and much the same there); asking again gives the same, leaves the first result as it was,
    and no two values share memory; nor does it matter what else is asked for, or that vectors and samples are taken in
    chunks (`max_memory`).  Where the class says how batches make up one (`over_ranks`, `merge`), the halves of the
    batch must: merged as `pb.statistics` merges them, and added up as processes do.

    Raises AssertionError, which says what is off for which parameter, at which entry, and by how much.
    """
    try:
        (quantity,) = resolve(quantity)
    except ValueError as e:
        raise AssertionError(str(e)) from e
    if (pair := as_batch(batch)) is None:
        raise ValueError(f"batch is a {type(batch).__name__}; expected (inputs, targets) or a dict with 'labels'.")
    if len(pair[1]) < 2:
        raise ValueError(f"the batch has {len(pair[1])} samples; expected at least 2.")
    check = _Check(quantity, copy.deepcopy(model).double(), Loss.from_torch(loss_fn), _cast(pair, torch.float64))
    check.form()
    check.repetition()
    check.chunks()
    check.precision(copy.deepcopy(model).float(), _cast(pair, torch.float32))
    check.halves()
    if expected is not None:
        check.definition(expected)


class _Check:
    def __init__(self, quantity: Quantity, model: nn.Module, loss: Loss, batch: tuple[Any, Tensor]):
        self.quantity, self.model, self.loss, self.batch = quantity, model, loss, batch
        self.parameters, self.what = trees.parameters(model), type(quantity).__name__

    def value(self, batch: Any = None, beside: tuple[Quantity, ...] = (), **options: Any) -> dict[str, Any]:
        wanted = [*beside[:1], self.quantity, *beside[1:]]
        return statistics(self.model, self.loss, self.batch if batch is None else batch, wanted, **options)[self.name]

    @property
    def name(self) -> str:
        return self.quantity.name

    def _equal(self, found: Any, expected: Any, what: str, by: str) -> None:
        for k in self.parameters:
            check_trees(found[k], expected[k], f"{self.what} of {k!r}{what}", by)

    def form(self) -> None:
        q = self.quantity
        for field, kind in (("name", str), ("source", Source), ("needs", frozenset | set), ("least_samples", int)):
            if not isinstance(getattr(q, field, None), kind):
                raise AssertionError(f"{self.what}.{field} is {getattr(q, field, None)!r}; expected a "
                                     f"{getattr(kind, '__name__', 'set')}.")  # fmt: skip
        if q.over_ranks not in ("running", "local", None):
            raise AssertionError(f"{self.what}.over_ranks is {q.over_ranks!r}; expected 'running', 'local' or None.")
        self.first = self.value()
        for k, p in self.parameters.items():
            for t in leaves(self.first[k]).values():
                if t.is_floating_point() and t.dtype != p.dtype:
                    raise AssertionError(f"{self.what} of {k!r} is {t.dtype}; expected {p.dtype}, the parameter's.")
        if not any(leaves(self.first[k]) for k in self.parameters):
            raise AssertionError(f"{self.what} has no tensor for any parameter; expected that `add` returns one.")

    def repetition(self) -> None:
        """Again, and beside a quantity that destroys what it is given."""
        kept = {k: {path: t.clone() for path, t in leaves(v).items()} for k, v in self.first.items()}
        self._equal(self.value(), kept, " asked for again", "the first time")
        self._equal(self.first, kept, " after a second call", "the value before it")
        owners: dict[int, str] = {
            p.untyped_storage().data_ptr(): f"the parameter {k!r}" for k, p in self.parameters.items()
        }
        for k in self.parameters:
            for t in leaves(self.first[k]).values():
                at = t.untyped_storage().data_ptr()
                if (owner := owners.get(at)) not in (None, f"the value of {k!r}"):
                    raise AssertionError(
                        f"{self.what} of {k!r} shares memory with {owner}; expected a tensor of its own."
                    )
                owners[at] = f"the value of {k!r}"
        greedy = _Greedy(self.quantity)
        for beside in ((greedy,), (greedy, _Greedy(self.quantity, "greedy too"))):
            found = self.value(beside=beside)
            self._equal(found, kept, " beside a quantity that changes its values in place", "the quantity alone")
        found = statistics(self.model, self.loss, self.batch, [self.quantity, greedy])[self.name]
        self._equal(found, kept, " before a quantity that changes its values in place", "the quantity alone")

    def chunks(self) -> None:
        for memory in (1, 4096):
            self._equal(self.value(max_memory=memory), self.first, f" in chunks (max_memory={memory})", "all at once")

    def precision(self, model: nn.Module, batch: Any) -> None:
        single = statistics(model, self.loss, batch, self.quantity)[self.name]
        for k, p in trees.parameters(model).items():
            for t, full in zip(leaves(single[k]).values(), leaves(self.first[k]).values(), strict=True):
                if t.is_floating_point() and t.dtype != p.dtype:
                    raise AssertionError(f"{self.what} of {k!r} is {t.dtype} for a model in {p.dtype}; expected that.")
                if self.quantity.source.kind != "sampled":  # the labels may differ
                    check_equal(t, full, f"{self.what} of {k!r} in float32", "the value in float64", SINGLE)

    def halves(self) -> None:
        """Two batches as one."""
        q, kind = self.quantity, type(self.quantity)
        merges = (kind.merge, kind.over_batches) != (Quantity.merge, Quantity.over_batches)
        if not merges and q.over_ranks != "running":
            return
        if q.source.kind == "sampled" or q.source.tol:  # other vectors in each half; merging does not depend on them
            q = copy.copy(q)
            object.__setattr__(q, "source", ROOT)
        x, y = self.batch
        N = len(y)
        parts = [(_samples(x, s, N), y[s]) for s in (slice(None, N // 2), slice(N // 2, None))]
        whole = statistics(self.model, self.loss, self.batch, q)[q.name]
        try:
            merged = statistics(self.model, self.loss, parts, q)[q.name]
        except ValueError:
            return  # its `merge` says that they make up none
        except RuntimeError as e:
            raise AssertionError(f"{self.what}: two batches cannot be merged ({e}); expected that `merge` and `finish` "
                                 "make the value of one batch of all samples.") from e  # fmt: skip
        self._equal(merged, whole, " of two batches, merged", "one batch of all samples")
        if q.over_ranks == "running" and q.source.kind != "nothing":
            running = [self._running(q, part) for part in parts]
            sums = {k: self._sum(k, running[0][k], running[1][k]) for k in self.parameters}
            found = finished(q, sums, self.parameters, Scale(N, 1 / self.loss.normalizer(self._output(), y)))
            self._equal(found, whole, ", the running values of two processes added up", "one process with all samples")

    def _running(self, q: Quantity, part: Any) -> dict[str, Any]:
        tape = Recording(self.model)
        with tape.recording():
            f = call(self.model, part[0])
        return tape.running(self.loss, f, part[1], [q], torch.Generator().manual_seed(0))[0][q.name]

    def _sum(self, name: str, a: Any, b: Any) -> Any:
        """Tensor by tensor, as processes add up what they hold."""
        others: list[Tensor] = []
        trees.mapped(others.append, b)
        theirs = iter(others)
        try:
            return trees.mapped(lambda t: t + next(theirs), a)
        except (RuntimeError, StopIteration):
            raise AssertionError(
                f"{self.what} of {name!r}: the running values of two batches are {a!r:.200} and {b!r:.200}, which do "
                "not add up; expected tensors of one structure and shape, as over_ranks = 'running' says."
            ) from None

    def _output(self) -> Tensor:
        return call(self.model, self.batch[0])

    def definition(self, expected: Expected) -> None:
        source, y = self.quantity.source, self.batch[1]
        if source.kind == "nothing":
            raise ValueError(
                f"{self.what} pulls no vectors back (its source is NOTHING); expected= is for those that do."
            )
        f = self._output()
        found = output_vectors(self.loss, f, y, source, torch.Generator(device=f.device).manual_seed(0))
        vectors = list(found.columns if isinstance(found, LeadingRoot) else found)
        scale = Scale(len(f), 1 / self.loss.normalizer(f, y))
        params = list(self.parameters.values())
        rows: list[list[tuple[Tensor | None, ...]]] = []
        for v in vectors:
            rows.append([])
            for n in range(len(f)):
                rows[-1].append(torch.autograd.grad(f[n], params, v[n], retain_graph=True, allow_unused=True))
        for i, (k, p) in enumerate(self.parameters.items()):
            gs = [g[i] for row in rows for g in row]
            J = torch.stack([torch.zeros_like(p) if g is None else g for g in gs]).unflatten(0, (len(rows), len(f)))
            check_trees(self.first[k], expected(J, scale), f"{self.what} of {k!r}", "`expected` of autograd's vectors")


class _Greedy(Quantity):
    """What is needed for another quantity, overwritten in place as soon as it is a quantity's own."""

    over_ranks, per_sample = "running", True

    def __init__(self, other: Quantity, name: str = "greedy"):
        self.name, self.source, self.needs = name, other.source, frozenset(other.needs)
        self.twice, self.per_sample = other.twice, other.per_sample

    def add(self, value: Any, group: Any) -> Any:
        return dict(group.parts) if value is None else value

    def finish(self, value: Any, scale: Scale) -> Any:
        return trees.mapped(lambda t: t.zero_(), value)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return trees.mapped(lambda t: t.detach().to(dtype) if t.is_floating_point() else t, tree)


def _samples(inputs: Any, s: slice, N: int) -> Any:
    """The samples of every tensor that has N of them along axis 0."""
    return trees.mapped(lambda t: t[s] if t.dim() and len(t) == N else t, inputs)
