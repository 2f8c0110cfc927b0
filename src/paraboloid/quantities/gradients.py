"""What the pulled-back gradients of single samples give: the gradient, its parts, and their moments."""

from __future__ import annotations

from torch import Tensor

from paraboloid.quantities.quantity import GRADIENT, PerSample, Quantity, plus


def over_vectors(J: Tensor) -> Tensor:
    """Sum over axis 0; a single vector is not copied."""
    return J[0] if len(J) == 1 else J.sum(0)


class Grad(Quantity):
    """Gradient of the loss as reduced, [*shape]; exact."""

    name, source, needs = "grad", GRADIENT, frozenset({"total"})
    over_ranks = "running"
    per_sample, by_rows = False, True

    def add(self, value, group):
        return plus(value, group.parts["total"])

    def finish(self, value, scale):
        return value.mul_(scale.a)


class SampleGrads(PerSample):
    """Individual gradients g_n, [N, *shape]; of the unreduced loss, exact."""

    name, source, needs = "sample_grads", GRADIENT, frozenset({"samples"})

    def add(self, value, group):
        return plus(value, over_vectors(group.parts["samples"]))


class SquareNorms(PerSample):
    """||g_n||^2, [N]; of the unreduced loss, exact."""

    name, source, needs = "square_norms", GRADIENT, frozenset({"norms"})

    def add(self, value, group):
        return plus(value, group.parts["norms"])


class Gram(Quantity):
    """g_n . g_m, [N, N]; of the unreduced loss, exact.

    Of one batch no gradient is formed where an equal form is cheaper; the products of samples of different batches take
    all of them, [N, *shape], until the end.
    """

    name, source, needs = "gram", GRADIENT, frozenset({"gram"})
    over_ranks = "local"

    def add(self, value, group):
        return plus(value, group.parts["gram"])

    def over_batches(self):
        return _GramOfAll()


class _GramOfAll(SampleGrads):
    """The same of several batches, whose gradients are held."""

    name = "gram"

    def finish(self, value, scale):
        g = super().finish(value, scale)
        g = g.reshape(len(g), -1)
        return g @ g.mT


class SecondMoment(Quantity):
    """mean_n g_n^2, [*shape]; uncentred, of the unreduced loss, exact."""

    name, source, needs = "second_moment", GRADIENT, frozenset({"squares"})
    over_ranks = "running"

    def add(self, value, group):
        return plus(value, group.parts["squares"])

    def finish(self, value, scale):
        return value.div_(scale.N)


class Variance(Quantity):
    """mean_n (g_n - mean g)^2, [*shape]; divided by N (biased by (N - 1) / N), of the unreduced loss."""

    name, source, needs = "variance", GRADIENT, frozenset({"squares", "total"})
    over_ranks = "running"
    least_samples = 2

    def add(self, value, group):
        parts = group.parts["squares"], group.parts["total"]
        return parts if value is None else tuple(v + p for v, p in zip(value, parts, strict=True))

    def finish(self, value, scale):
        squares, total = value
        squares.div_(scale.N).addcmul_(total, total, value=-(scale.N**-2))
        return squares.clamp_(min=0)  # rounding may leave -1e-17
