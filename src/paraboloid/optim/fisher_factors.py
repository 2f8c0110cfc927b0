"""What the optimisers measure in a training pass: a Kronecker block for every parameter, whatever its structure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Kron
from paraboloid.quantities.kronecker import EigenScale, check_sharing, fisher_source
from paraboloid.quantities.quantity import Group, Quantity, Scale
from paraboloid.reductions import kronecker_factors
from paraboloid.reductions.eigenbasis import eigen_scale
from paraboloid.reductions.outer import Outer, known
from paraboloid.reductions.sums import reduce


class FisherFactors(Quantity):
    """Kronecker factors of each parameter in `names`, `Kron`, of the loss as reduced; see `pb.quantities.KFAC`.

    A parameter without Kronecker structure (weight_norm's, one that a fallback pulls) has the diagonal of its block
    instead, as the one-dimensional left factor of a `Kron` whose right factor is one.

    halves: the batch in two, samples [0, N/2) and [N/2, N), each with factors of its own as if it were the batch.
    """

    name, per_sample = "fisher_factors", False
    over_ranks = "running"

    def __init__(self, names: Container[str], fisher: str, samples: int, sharing: str, halves: bool = False):
        self.source = fisher_source(fisher, samples)
        self.names, self.sharing, self.halves = names, check_sharing(sharing), halves
        self.least_samples = 2 if halves else 1

    def add(self, value: Any, group: Group) -> Any:
        if group.name not in self.names:
            return None
        if not self.halves:
            return self._add(value, group.outer, group.memory, group.recent)
        parts = value or (None, None)
        return tuple(
            self._add(part, half, group.memory) for part, half in zip(parts, in_halves(group.outer), strict=True)
        )

    def _add(self, value: Any, o: Outer, memory: int | None, recent: Any = None) -> Any:
        if isinstance(value, Tensor):
            return value.add_(reduce(o, {"squares"}, memory)["squares"])
        try:
            return kronecker_factors.add_factors(value, o, self.sharing, memory, recent=recent)
        except NotImplementedError:
            return reduce(o, {"squares"}, memory)["squares"]

    def finish(self, value: Any, scale: Scale) -> Any:
        if value is None:
            return None
        if not self.halves:
            return block(value, scale.a)
        first = scale.N // 2
        return block(value[0], scale.a * scale.N / first), block(value[1], scale.a * scale.N / (scale.N - first))


class Held(Quantity):
    """The pulled-back vectors of each parameter in `names` themselves, for eigenvalues in a basis that comes later; the
    sum of their squares where the basis will be that of single entries.  `half`: of the second half of the batch."""

    name, per_sample = "held", False
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
        return [*(value or []), found]

    def finish(self, value: Any, scale: Scale) -> Any:
        return None if value is None else HeldVectors(value, scale.a * _of_half(scale.N, self.half))


class HeldVectors:
    """One parameter's pulled-back vectors of one pass, with the factor of its batch."""

    def __init__(self, groups: list[Outer | Tensor], factor: float):
        self.groups, self.factor = groups, factor

    def eigenvalues(self, form: Eigenform) -> Tensor:
        """What `Eigenvalues` measures, in a basis that was not known yet."""
        found = [
            eigen_scale(group, form.left, form.right) if isinstance(group, Outer) else group.reshape(form.values.shape)
            for group in self.groups
        ]
        return torch.stack(found).sum(0).mul_(self.factor)


class Eigenvalues(EigenScale):
    """EKFAC's eigenvalues of the parameters that have a basis; `half`: those of the second half of the batch, as if it
    were the batch."""

    name, some = "eigenvalues", True

    def __init__(self, forms: Mapping[str, Eigenform], fisher: str, samples: int, half: bool = False):
        super().__init__(forms, fisher, samples)
        self.half, self.least_samples = half, 2 if half else 1

    def add(self, value: Any, group: Group) -> Any:
        return super().add(value, group._replace(outer=in_halves(group.outer)[1]) if self.half else group)

    def finish(self, value: Any, scale: Scale) -> Any:
        return None if value is None else value.mul_(scale.a * _of_half(scale.N, self.half))


def _of_half(N: int, half: bool) -> float:
    return N / (N - N // 2) if half else 1.0


def block(value: Any, a: float) -> Kron:
    """The finished block of a running value: of factors, or of the sum of squares."""
    if isinstance(value, Tensor):
        return Kron(value.mul_(a).flatten(), value.new_ones(1, 1))
    return kronecker_factors.scale_factors(value, a)


def in_halves(o: Outer) -> tuple[Outer, Outer]:
    """One parameter's vectors for the first and the second half of the samples."""
    N = o.left.shape[1]
    return o.of(slice(0, N // 2)), o.of(slice(N // 2, N))
