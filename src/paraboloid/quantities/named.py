"""The quantities: which vectors to pull back, and how to reduce them.

| pull back \\ reduce    | samples      | sum of squares      | squared norms, Gram | Kronecker factors |
|-----------------------|--------------|---------------------|---------------------|-------------------|
| the loss gradient     | SampleGrads  | SecondMoment, Variance | SquareNorms, Gram | KFAC("empirical") |
| exact root of Hessian | SqrtGGN      | DiagGGN             |                     | KFAC("exact")     |
| sampled labels        |              | DiagGGN(samples=1)  |                     | KFAC("mc")        |
| any, in an eigenbasis |              | EigenScale          |                     |                   |
| second derivatives    |              | DiagHessian         |                     |                   |
| recursion over layers |              |                     |                     | KFRA              |

g_n is the gradient of the *unreduced* loss of sample n, a = 1 / normalizer the reduction's factor (1/N for a mean),
and J_n^T S_n the pulled-back root of the output-Hessian: the GGN of the loss as reduced is a sum_{v,n} of its squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.graph.hessian_diagonal import diag_hessian
from paraboloid.graph.kfra_recursion import kfra
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Kron
from paraboloid.linalg.operand import check_count
from paraboloid.quantities.quantity import GRADIENT, NOTHING, ROOT, Group, Quantity, Scale, Source
from paraboloid.reductions import kronecker_factors
from paraboloid.reductions.eigenbasis import eigen_scale


def _plus(value: Tensor | None, part: Tensor) -> Tensor:
    return part if value is None else value.add_(part)


def _over_vectors(J: Tensor) -> Tensor:
    """Sum over axis 0; a single vector is not copied."""
    return J[0] if len(J) == 1 else J.sum(0)


@dataclass(frozen=True)
class Grad(Quantity):
    """Gradient of the loss as reduced, [*shape]; exact."""

    name: str = "grad"
    source: Source = GRADIENT
    needs = frozenset({"total"})
    over_ranks = "running"
    per_sample = False

    def add(self, value, group):
        return _plus(value, group.parts["total"])

    def finish(self, value, scale):
        return value.mul_(scale.a)


@dataclass(frozen=True)
class SampleGrads(Quantity):
    """Individual gradients g_n, [N, *shape]; of the unreduced loss, exact."""

    name: str = "sample_grads"
    source: Source = GRADIENT
    needs = frozenset({"samples"})
    over_ranks = "local"

    def add(self, value, group):
        return _plus(value, _over_vectors(group.parts["samples"]))


@dataclass(frozen=True)
class SquareNorms(Quantity):
    """||g_n||^2, [N]; of the unreduced loss, exact."""

    name: str = "square_norms"
    source: Source = GRADIENT
    needs = frozenset({"norms"})
    over_ranks = "local"

    def add(self, value, group):
        return _plus(value, group.parts["norms"])


@dataclass(frozen=True)
class Gram(Quantity):
    """g_n . g_m, [N, N]; of the unreduced loss, exact."""

    name: str = "gram"
    source: Source = GRADIENT
    needs = frozenset({"gram"})
    over_ranks = "local"

    def add(self, value, group):
        return _plus(value, group.parts["gram"])


@dataclass(frozen=True)
class SecondMoment(Quantity):
    """mean_n g_n^2, [*shape]; uncentred, of the unreduced loss, exact."""

    name: str = "second_moment"
    source: Source = GRADIENT
    needs = frozenset({"squares"})
    over_ranks = "running"

    def add(self, value, group):
        return _plus(value, group.parts["squares"])

    def finish(self, value, scale):
        return value.div_(scale.N)


@dataclass(frozen=True)
class Variance(Quantity):
    """mean_n (g_n - mean g)^2, [*shape]; divided by N (biased by (N - 1) / N), of the unreduced loss."""

    name: str = "variance"
    source: Source = GRADIENT
    needs = frozenset({"squares", "total"})
    over_ranks = "running"
    least_samples = 2

    def add(self, value, group):
        parts = group.parts["squares"], group.parts["total"]
        return parts if value is None else tuple(v + p for v, p in zip(value, parts, strict=True))

    def finish(self, value, scale):
        squares, total = value
        squares.div_(scale.N).addcmul_(total, total, value=-(scale.N**-2))
        return squares.clamp_(min=0)  # rounding may leave -1e-17


def _sampled(samples: int | None) -> Source:
    return ROOT if samples is None else Source("sampled", check_count("samples", samples))


FISHERS = {"mc": "kfac", "exact": "kflr", "empirical": "kfac_empirical"}


def fisher_source(fisher: str, samples: int = 1) -> Source:
    """What a Fisher pulls back; raises ValueError for an unknown one and for samples < 1."""
    if fisher not in FISHERS:
        raise ValueError(f"fisher is {fisher!r}; expected one of {list(FISHERS)}.")
    return {"mc": _sampled(check_count("samples", samples)), "exact": ROOT, "empirical": GRADIENT}[fisher]


def check_sharing(sharing: str) -> str:
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing is {sharing!r}; expected 'expand' or 'reduce'.")
    return sharing


class DiagGGN(Quantity):
    """Diagonal of the GGN of the loss as reduced, [*shape]; exact, or by Monte Carlo with `samples` sampled labels
    (unbiased; the diagonal of the Monte Carlo Fisher)."""

    needs = frozenset({"squares"})
    over_ranks = "running"

    def __init__(self, samples: int | None = None):
        self.name, self.source = "diag_ggn" if samples is None else "diag_ggn_mc", _sampled(samples)

    def add(self, value, group):
        return _plus(value, group.parts["squares"])

    def finish(self, value, scale):
        return value.mul_(scale.a)


class SampleDiagGGN(Quantity):
    """Diagonal of J_n^T H_n J_n of every sample, [N, *shape]; of the unreduced loss, exact or by Monte Carlo."""

    needs = frozenset({"samples"})
    over_ranks = "local"

    def __init__(self, samples: int | None = None):
        self.name, self.source = "sample_diag_ggn", _sampled(samples)

    def add(self, value, group):
        return _plus(value, _over_vectors(group.parts["samples"].square()))


class SqrtGGN(Quantity):
    """J_n^T S_n, [V, N, *shape], with S_n S_n^T = H_n; of the unreduced loss.

    a times the sum over V and N of outer products is the GGN of the loss as reduced.  Exact: V = (classes - 1) per
    position for cross-entropy, whose Hessian has that rank, and one per output element otherwise; or Monte Carlo,
    V = samples.
    """

    needs = frozenset({"samples"})
    over_ranks = "local"

    def __init__(self, samples: int | None = None):
        self.name, self.source = "sqrt_ggn", _sampled(samples)

    def add(self, value, group):
        return [*(value or []), group.parts["samples"]]

    def finish(self, value, scale):
        return torch.cat(value)


class DiagHessian(Quantity):
    """Diagonal of the Hessian of the loss as reduced, [*shape]; exact, for smooth activations, normalisation and
    attention too, and for losses that are not convex.

    Where all layers and activations are piecewise linear it is the diagonal of the GGN, at its cost; smooth elementwise
    activations between linear layers add little.  Else it takes products with the Hessian in the layers' outputs: see
    `paraboloid.diag_hessian` for what is computed and what it costs.
    """

    name, source, needs, twice = "diag_hessian", NOTHING, frozenset({"squares"}), True
    over_ranks = "finished"
    _finish: Callable[[dict[str, Any]], dict[str, Tensor]]

    def bound(self, tape, loss, f, y, memory):
        quantity = DiagHessian()
        takes_root, quantity._finish = diag_hessian(tape, loss, f, y, memory)
        quantity.source = ROOT if takes_root else NOTHING
        return quantity

    def add(self, value, group):
        squares = group.parts["squares"]
        return _plus(value, squares)

    def complete(self, values, scale):
        return {name: scale.a * value for name, value in self._finish(values).items()}


class KFAC(Quantity):
    """Kronecker factors of the curvature block, `Kron(left, right)`, of the loss as reduced.

    fisher: "mc" (labels sampled from the model, unbiased factors), "exact" (KFLR) or "empirical" (the given labels).
    sharing: "expand" or "reduce", for weights used at several positions.

    Batch norm in training mode is accepted, as optimisers need it: the vectors of all samples are pulled at once, and a
    sample's row of a layer's output gradient also holds what the others feel through the batch's statistics.  For
    sampled labels these cross terms vanish on average.  The norm's own weight and bias are treated in the same way.
    """

    per_sample = False
    over_ranks = "running"

    def __init__(self, fisher: str = "mc", samples: int = 1, sharing: str = "expand"):
        self.source = fisher_source(fisher, samples)
        self.name, self.sharing = FISHERS[fisher], check_sharing(sharing)

    def add(self, value, group):
        return kronecker_factors.add_factors(value, group.outer, self.sharing, group.memory, recent=group.recent)

    def finish(self, value, scale):
        return kronecker_factors.scale_factors(value, scale.a)


class EigenScale(Quantity):
    """Eigenvalues in given Kronecker eigenbases, [G, r_left, r_right], of the loss as reduced: the scale of EKFAC.

    a sum_{v,n} (u_i . (J_n^T v) w_j)^2 for the eigenvectors u_i, w_j of each parameter's factors: the diagonal of its
    exact block (or Monte Carlo, or empirical) in that basis, positions and uses summed before squaring.

    forms: an `Eigenform` by parameter name, from `Kron.eigenform()` say.  fisher, samples: as in `KFAC`.
    Source: George et al. 2018, arXiv:1806.03884.
    """

    name, per_sample = "eigen_scale", False
    over_ranks = "running"

    def __init__(self, forms: Mapping[str, Eigenform], fisher: str = "mc", samples: int = 1):
        self.forms, self.source = forms, fisher_source(fisher, samples)

    def add(self, value, group):
        if group.name not in self.forms:
            raise ValueError(f"parameter {group.name!r} has no eigenbasis; expected one in forms, which has "
                             f"{sorted(self.forms)}.")  # fmt: skip
        form = self.forms[group.name]
        return _plus(value, eigen_scale(group.outer, form.left, form.right, group.memory))

    def finish(self, value, scale):
        return value.mul_(scale.a)


class KFRA(Quantity):
    """Kronecker factors by a recursion over the layers, `Kron(left, right)`, of the loss as reduced: for sequential
    networks of linear, convolution, activation and pooling layers.

    The curvature in a layer's output is averaged over the batch before it passes the layer below, so the cost does not
    grow with the number of classes as that of "kflr" does.  For one sample, and for deep linear networks, it is "kflr".

    The matrix has D x D entries for a layer with D output elements.  Where images make it larger than a quarter of
    `max_memory` (64 MiB by default) it is kept in channel blocks: what couples the channels at one position, for each
    position; what couples different positions is dropped, at every layer below too.  A bias's factor then is the sum of
    these blocks.

    Raises NotImplementedError for branches (residual connections), other layers, and parameters used several times.
    Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
    """

    name, source = "kfra", NOTHING
    _compute: Callable[[], dict[str, Kron]]

    def bound(self, tape, loss, f, y, memory):
        quantity = KFRA()
        quantity._compute = partial(kfra, tape, loss, f, y, memory)
        return quantity

    def complete(self, values, scale):
        return self._compute()


QUANTITIES = {
    "grad": Grad,
    "sample_grads": SampleGrads,
    "square_norms": SquareNorms,
    "gram": Gram,
    "second_moment": SecondMoment,
    "variance": Variance,
    "diag_ggn": DiagGGN,
    "diag_ggn_mc": lambda: DiagGGN(samples=1),
    "diag_hessian": DiagHessian,
    "sample_diag_ggn": SampleDiagGGN,
    "sqrt_ggn": SqrtGGN,
    "kfac": KFAC,
    "kflr": lambda: KFAC("exact"),
    "kfac_empirical": lambda: KFAC("empirical"),
    "kfra": KFRA,
}


def resolve(entries: Any) -> list[Quantity]:
    """Names and `Quantity` objects -> objects, without repeats.  Raises ValueError for unknown or clashing ones."""
    entries = [entries] if isinstance(entries, str | Quantity) else list(entries)
    found: dict[str, Quantity] = {}
    for entry in entries:
        if isinstance(entry, str) and entry not in QUANTITIES:
            raise ValueError(f"unknown quantity {entry!r}; expected one of {sorted(QUANTITIES)} or an object of "
                             "pb.quantities.")  # fmt: skip
        if not isinstance(entry, str | Quantity):
            raise ValueError(f"a quantity is {entry!r}; expected a name or an object such as pb.quantities.DiagGGN().")
        quantity = QUANTITIES[entry]() if isinstance(entry, str) else entry
        if quantity.name in found and entry != quantity.name:
            raise ValueError(f"{quantity.name!r} is asked for twice; ask for it once.")
        found[quantity.name] = quantity
    if not found:
        raise ValueError(f"no quantity is asked for; expected some of {sorted(QUANTITIES)}.")
    return list(found.values())


def check_samples(quantities: list[Quantity], N: int) -> None:
    """Raise ValueError for a batch too small for a quantity."""
    for q in quantities:
        if q.least_samples > N:
            raise ValueError(f"{q.name!r} needs a batch of at least {q.least_samples} samples; found {N}.")


__all__ = [
    "GRADIENT", "KFAC", "KFRA", "NOTHING", "ROOT", "DiagGGN", "DiagHessian", "EigenScale", "Grad", "Gram", "Group",
    "Kron", "Quantity", "SampleDiagGGN", "SampleGrads", "Scale", "SecondMoment", "Source", "SqrtGGN", "SquareNorms",
    "Variance",
]  # fmt: skip
