"""What the optimisers measure in a training pass: a Kronecker block for every parameter, whatever its structure.

Running values are sums over samples, so that several passes in a step (gradient accumulation) are one big batch.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform
from paraboloid.quantities.kronecker import KFAC, EigenScale, fisher_source
from paraboloid.quantities.named import check_samples
from paraboloid.quantities.quantity import Group, Quantity, Scale
from paraboloid.reductions import kronecker_factors
from paraboloid.reductions.eigenbasis import eigen_scale
from paraboloid.reductions.kronecker_factors import MAX_FACTOR
from paraboloid.reductions.outer import Outer, known
from paraboloid.reductions.sums import reduce


class FisherFactors(KFAC):
    """`pb.quantities.KFAC` of the parameters in `names`; None for others.

    halves: each batch in two, samples [0, N/2) and [N/2, N), with factors of its own as if it were the batch.
    """

    by_rows = True

    def __init__(
        self, names: Container[str], fisher: str, samples: int, sharing: str, halves: bool = False,
        max_factor: int = MAX_FACTOR, thin: bool = False,
    ):  # fmt: skip
        super().__init__(fisher, samples, sharing, max_factor=max_factor, thin=thin)
        self.name, self.names, self.halves = "fisher_factors", names, halves
        self.least_samples = 2 if halves else 1
        self._said = False

    def bound(self, tape, loss, f, y, memory):
        check_samples([self], len(f))  # of each batch, not of all together
        return self

    def add(self, value: Any, group: Group) -> Any:
        if group.name not in self.names:
            return None
        if not self.halves:
            return super().add(value, group)
        parts, counts = value or ((None, None), _counts(group.outer))
        pairs = zip(parts, in_halves(group.outer), strict=True)
        return tuple(kronecker_factors.add_factors(part, o, self.kept, group.memory) for part, o in pairs), counts

    def merge(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        if not self.halves:
            return super().merge(a, b)
        return tuple(super(FisherFactors, self).merge(x, y) for x, y in zip(a[0], b[0], strict=True)), a[1] + b[1]

    def announce(self, values: Mapping[str, Any]) -> None:
        """Of sides that are too long, once in an optimiser's life; its `diagnostics` say what structure each has."""
        found = {k: v[0][0] if self.halves else v for k, v in values.items() if v is not None}
        long = {k: v for k, v in found.items() if "max_factor" in v.diagonal}
        if long and not self._said:
            self._said = True
            kronecker_factors.say_what_is_diagonal(long)

    def finish(self, value: Any, scale: Scale) -> Any:
        if value is None or not self.halves:
            return None if value is None else super().finish(value, scale)
        parts, counts = value
        N, *each = counts.tolist()
        return tuple(super(FisherFactors, self).finish(part, scale._replace(a=scale.a * N / n))
                     for part, n in zip(parts, each, strict=True))  # fmt: skip


class HeldVectors:
    """One parameter's pulled-back vectors of the passes of a step; the factor that their squares take."""

    def __init__(self, groups: list[Outer | Tensor], counts: Tensor, factor: float = 1.0):
        self.groups, self.counts, self.factor = groups, counts, factor

    def eigenvalues(self, form: Eigenform) -> Tensor:
        """What `Eigenvalues` measures, in a basis that was not known yet."""
        found = [
            eigen_scale(group, form.left, form.right) if isinstance(group, Outer) else group.reshape(form.values.shape)
            for group in self.groups
        ]
        return torch.stack(found).sum(0).mul_(self.factor)


class FisherDiagonal(Quantity):
    """The diagonal of the Fisher information with sampled labels, [*shape], of the loss as reduced: `diag_ggn_mc`, and
    for a batch that batch norm mixes what its rows give, as Kronecker factors do."""

    name, per_sample, by_rows = "fisher_diagonal", False, True
    over_ranks = "running"

    def __init__(self):
        self.source, self.twice = fisher_source("mc", 1), False

    def add(self, value: Any, group: Group) -> Any:
        squares = reduce(group.outer, {"squares"}, group.memory)["squares"]
        return squares if value is None else value.add_(squares)

    def finish(self, value: Any, scale: Scale) -> Any:
        return None if value is None else value.mul_(scale.a)


class Held(Quantity):
    """The pulled-back vectors of each parameter in `names` themselves, for eigenvalues in a basis that comes later; the
    sum of their squares where the basis will be that of single entries.  `half`: of the second half of each batch."""

    name, per_sample, by_rows = "held", False, True
    over_ranks = "local"

    def __init__(self, names: Container[str], fisher: str, samples: int, half: bool = False):
        self.source, self.names, self.half = fisher_source(fisher, samples), names, half
        self.least_samples = 2 if half else 1

    def add(self, value: Any, group: Group) -> Any:
        if group.name not in self.names:
            return None
        o = in_halves(group.outer)[1] if self.half else group.outer
        found: Any = o
        if not o.lasting:  # it needs the graph, which goes: look at it now
            found = known(o.samples()) if o.bias_like else reduce(o, {"squares"}, group.memory)["squares"]
        return HeldVectors([*(value.groups if value else []), found], _counts(group.outer))

    def merge(self, a: HeldVectors | None, b: HeldVectors | None) -> HeldVectors | None:
        if a is None or b is None:
            return b if a is None else a
        return HeldVectors([*a.groups, *b.groups], a.counts + b.counts)

    def finish(self, value: Any, scale: Scale) -> Any:
        return (
            None
            if value is None
            else HeldVectors(value.groups, value.counts, scale.a * _share(value.counts, self.half))
        )


class Eigenvalues(EigenScale):
    """EKFAC's eigenvalues of the parameters that have a basis; `half`: those of the second half of each batch, as if it
    were the batch."""

    name, some, by_rows = "eigenvalues", True, True

    def __init__(self, forms: Mapping[str, Eigenform], fisher: str, samples: int, half: bool = False):
        super().__init__(forms, fisher, samples)
        self.half, self.least_samples = half, 2 if half else 1

    def add(self, value: Any, group: Group) -> Any:
        before, counts = value or (None, _counts(group.outer))
        o = in_halves(group.outer)[1] if self.half else group.outer
        found = super().add(before, group._replace(outer=o))
        return None if found is None else (found, counts)

    def finish(self, value: Any, scale: Scale) -> Any:
        return None if value is None else value[0].mul_(scale.a * _share(value[1], self.half))


def _counts(o: Outer) -> Tensor:
    """Samples of a batch, of its first and of its second half, [3]; a tensor, to be summed over passes and ranks."""
    N = o.left.shape[1]
    return torch.tensor([N, N // 2, N - N // 2], dtype=torch.float64, device="cpu")


def _share(counts: Tensor, half: bool) -> float:
    return float(counts[0] / counts[2]) if half else 1.0


def in_halves(o: Outer) -> tuple[Outer, Outer]:
    """One parameter's vectors for the first and the second half of the samples."""
    N = o.left.shape[1]
    return o.of(slice(0, N // 2)), o.of(slice(N // 2, N))
