"""Kronecker factors of every parameter's block, and eigenvalues along given Kronecker eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial

from paraboloid.graph.kfra_recursion import kfra
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.passes.memory import INPUTS
from paraboloid.quantities.quantity import GRADIENT, NOTHING, ROOT, Quantity, Source, plus, sampled
from paraboloid.reductions import kronecker_factors
from paraboloid.reductions.eigenbasis import Turned, eigen_scale
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, Factors, Kept, check_max_factor

FISHERS = {"mc": "kfac", "exact": "kflr", "empirical": "kfac_empirical"}


def fisher_source(fisher: str, samples: int = 1, tol: float = 0.0) -> Source:
    """What a Fisher pulls back; raises ValueError for an unknown one, for samples < 1, and for tol where not exact."""
    check_choice("fisher", fisher, list(FISHERS))
    check_count("samples", samples)
    if tol and fisher != "exact":
        raise ValueError(f"tol is {tol} with fisher={fisher!r}; expected 0, or fisher='exact', whose root tells what "
                         "is left out.")  # fmt: skip
    if fisher == "empirical":
        return GRADIENT
    return sampled(samples) if fisher == "mc" else sampled(None, tol)


def check_sharing(sharing: str) -> str:
    if sharing not in ("expand", "reduce"):
        raise ValueError(f"sharing is {sharing!r}; expected 'expand' or 'reduce'.")
    return sharing


class KFAC(Quantity):
    """Kronecker factors of the curvature block, `Kron(left, right)`, of the loss as reduced.

    fisher: "mc" (labels sampled from the model, unbiased factors), "exact" (KFLR) or "empirical" (the given labels).
    sharing: "expand" or "reduce", for weights used at several positions.
    tol: with fisher="exact", relative trace of the loss's Hessians that may be left out; see `paraboloid.statistics`.
    max_factor: a side with more rows (an output layer's over a large vocabulary) is kept as its diagonal, [p] or [q].

    A weight that enters its layer through another tensor (weight_norm), or that an operation without a rule uses, has
    the diagonal of its block, `Kron([D], [[1]])`, which is exact entry by entry; a warning names it, and such sides.

    Batch norm in training mode is accepted, as optimisers need it: the vectors of all samples are pulled at once, and a
    sample's row of a layer's output gradient also holds what the others feel through the batch's statistics.  For
    sampled labels these cross terms vanish on average.  The norm's own weight and bias are treated in the same way.
    """

    per_sample = False
    over_ranks = "running"
    takes_copies = True

    def __init__(
        self, fisher: str = "mc", samples: int = 1, sharing: str = "expand", tol: float = 0.0,
        max_factor: int = MAX_FACTOR, thin: bool = False,
    ):  # fmt: skip
        self.source, self.name = fisher_source(fisher, samples, tol), FISHERS[fisher]
        self.kept = Kept(check_sharing(sharing), thin, check_max_factor(max_factor))

    def add(self, value, group):
        return kronecker_factors.add_factors(value, group.outer, self.kept, group.memory, group.recent)

    def announce(self, values):
        kronecker_factors.say_what_is_diagonal(values)

    def merge(self, a, b):
        return kronecker_factors.merged(a, b)

    def finish(self, value, scale):
        return kronecker_factors.scale_factors(value, scale.a)


class EigenScale(Quantity):
    """Eigenvalues in given Kronecker eigenbases, [G, r_left, r_right], of the loss as reduced: the scale of EKFAC.

    a sum_{v,n} (u_i . (J_n^T v) w_j)^2 for the eigenvectors u_i, w_j of each parameter's factors: the diagonal of its
    exact block (or Monte Carlo, or empirical) in that basis, positions and uses summed before squaring.

    forms: an `Eigenform` by parameter name, from `Kron.eigenform()` say.  fisher, samples, tol: as in `KFAC`.
    Source: George et al. 2018, arXiv:1806.03884.
    """

    name, per_sample = "eigen_scale", False
    over_ranks = "running"
    some = False  # whether parameters without an eigenbasis are left out

    def __init__(self, forms: Mapping[str, Eigenform], fisher: str = "mc", samples: int = 1, tol: float = 0.0):
        self.forms, self.source = forms, fisher_source(fisher, samples, tol)
        self.vectors: int | None = None  # of a batch
        self.turned: Turned | None = None

    def bound(self, tape, loss, f, y, memory):
        quantity = copy(self)
        source = self.source
        if source.tol:
            quantity.vectors = loss.leading_root(f, y, source.tol).count
        else:
            quantity.vectors = loss.root_columns(f) if source == ROOT else source.samples
        quantity.turned = Turned(INPUTS.of(memory))
        return quantity

    def add(self, value, group):
        if group.name not in self.forms:
            if self.some:
                return None
            raise ValueError(f"parameter {group.name!r} has no eigenbasis; expected one in forms, which has "
                             f"{sorted(self.forms)}.")  # fmt: skip
        form, several = self.forms[group.name], (self.vectors or 0) > len(group.outer.left)
        turned = self.turned if several else None
        return plus(
            value, eigen_scale(group.outer, form.left, form.right, group.memory, self.vectors, turned, group.name)
        )

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
    these blocks.  `max_factor`: as in `KFAC`.

    Raises NotImplementedError for branches (residual connections), other layers, and parameters used several times.
    Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
    """

    name, source = "kfra", NOTHING
    _compute: Callable[[], dict[str, Factors]]

    def __init__(self, max_factor: int = MAX_FACTOR):
        self.kept = Kept(max_factor=check_max_factor(max_factor))

    def bound(self, tape, loss, f, y, memory):
        quantity = copy(self)
        quantity._compute = partial(kfra, tape, loss, f, y, memory, self.kept)
        return quantity

    def complete(self, values):
        return self._compute()

    def finish(self, value, scale):
        return kronecker_factors.scale_factors(value, scale.a)

    def announce(self, values):
        kronecker_factors.say_what_is_diagonal(values)

    def merge(self, a, b):
        raise ValueError(
            "'kfra' averages curvature over a batch before it passes each layer, so the values of several batches do "
            "not make up one; expected a single batch. Ask for 'kflr', which adds up."
        )
