"""Curvature, entry by entry: from the pulled-back root of the loss's Hessian, or from labels drawn by the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.graph.hessian_diagonal import diag_hessian
from paraboloid.quantities.gradients import over_vectors
from paraboloid.quantities.quantity import NOTHING, ROOT, PerSample, Quantity, plus, sampled


class DiagGGN(Quantity):
    """Diagonal of the GGN of the loss as reduced, [*shape]; exact, or by Monte Carlo with `samples` sampled labels
    (unbiased; the diagonal of the Monte Carlo Fisher).

    tol: relative trace of the loss's Hessians that may be left out, see `paraboloid.statistics`.
    """

    needs = frozenset({"squares"})
    over_ranks = "running"
    takes_copies = True

    def __init__(self, samples: int | None = None, tol: float = 0.0):
        self.name, self.source = "diag_ggn" if samples is None else "diag_ggn_mc", sampled(samples, tol)

    def add(self, value, group):
        return plus(value, group.parts["squares"])

    def finish(self, value, scale):
        return value.mul_(scale.a)


class SampleDiagGGN(PerSample):
    """Diagonal of J_n^T H_n J_n of every sample, [N, *shape]; of the unreduced loss, exact (but for `tol`) or by Monte
    Carlo."""

    needs = frozenset({"samples"})

    def __init__(self, samples: int | None = None, tol: float = 0.0):
        self.name, self.source = "sample_diag_ggn", sampled(samples, tol)

    def add(self, value, group):
        return plus(value, over_vectors(group.parts["samples"].square()))


class SqrtGGN(PerSample):
    """J_n^T S_n, [V, N, *shape], with S_n S_n^T = H_n; of the unreduced loss.

    a times the sum over V and N of outer products is the GGN of the loss as reduced.  Exact: V = (classes - 1) per
    position for cross-entropy, whose Hessian has that rank, and one per output element otherwise; or Monte Carlo,
    V = samples.

    tol: relative trace of the loss's Hessians that may be left out; V then is as many vectors as that takes, each
    sample's own largest ones, and batches with fewer are filled up with zeros.
    """

    needs, axis = frozenset({"samples"}), 1

    def __init__(self, samples: int | None = None, tol: float = 0.0):
        self.name, self.source = "sqrt_ggn", sampled(samples, tol)

    def add(self, value, group):
        return [*(value or []), group.parts["samples"]]

    def complete(self, values):
        return {k: groups[0] if len(groups) == 1 else torch.cat(groups) for k, groups in values.items()}

    def merge(self, a, b):
        joined = super().merge(a, b)
        if self.source.tol:
            most = max(len(root) for root in joined)
            return [torch.cat([root, root.new_zeros(most - len(root), *root.shape[1:])]) for root in joined]
        if len(found := {len(root) for root in joined}) > 1:
            raise ValueError(f"'sqrt_ggn': the batches have {sorted(found)} vectors for each sample; expected outputs "
                             "of one shape. Ask for it batch by batch.")  # fmt: skip
        return joined


class SampleDiagHessian(PerSample):
    """Diagonal of the Hessian of every sample's own unreduced loss, [N, *shape]; exact.

    What is computed, and what it costs, is as for `DiagHessian`; parameters that are used several times, or through
    other tensors, take one product for each of their elements and for each sample.
    """

    name, source, needs, twice = "sample_diag_hessian", NOTHING, frozenset({"samples"}), True
    _finish: Callable[[dict[str, Any]], dict[str, Tensor]]

    def bound(self, tape, loss, f, y, memory):
        quantity = SampleDiagHessian()
        takes_root, quantity._finish = diag_hessian(tape, loss, f, y, memory, each=True)
        quantity.source = ROOT if takes_root else NOTHING
        return quantity

    def add(self, value, group):
        return plus(value, over_vectors(group.parts["samples"].square()))

    def complete(self, values):
        return self._finish(values)


class DiagHessian(Quantity):
    """Diagonal of the Hessian of the loss as reduced, [*shape]; exact, for smooth activations, normalisation and
    attention too, and for losses that are not convex.

    Where all layers and activations are piecewise linear it is the diagonal of the GGN, at its cost; smooth elementwise
    activations between linear layers add little.  Else it takes products with the Hessian in the layers' outputs: see
    `paraboloid.diag_hessian` for what is computed and what it costs.
    """

    name, source, needs, twice = "diag_hessian", NOTHING, frozenset({"squares"}), True
    over_ranks = "running"
    _finish: Callable[[dict[str, Any]], dict[str, Tensor]]

    def bound(self, tape, loss, f, y, memory):
        quantity = DiagHessian()
        takes_root, quantity._finish = diag_hessian(tape, loss, f, y, memory)
        quantity.source = ROOT if takes_root else NOTHING
        return quantity

    def add(self, value, group):
        return plus(value, group.parts["squares"])

    def complete(self, values):
        return self._finish(values)

    def finish(self, value, scale):
        return value.mul_(scale.a)
