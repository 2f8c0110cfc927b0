"""The diagonal of the generalised Gauss-Newton matrix, as an operator."""

from __future__ import annotations

from torch import nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.eigenform import diagonal_form
from paraboloid.losses import LossFunction
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.quantities.curvature import DiagGGN
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.result import relative


def DiagonalGGN(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    samples: int | None = None,
    *,
    seed: int = 0,
    output: Output | None = None,
    max_memory: int | None = None,
    tol: float = 0.0,
) -> Diagonalised:
    """The matrix with the GGN's diagonal and zeros elsewhere, of the loss as reduced; one pass over the data.

    samples  None: exact, a sum_{v,n} (J_n^T s_{v,n})^2 over the columns of the loss's root.  A number: by Monte Carlo,
             with so many labels sampled for each input (unbiased).  For Hutchinson's estimate, which knows products
             alone, see ``pb.GGN(...).diagonal(samples=...)``.
    tol      of the exact one: relative trace of the loss's Hessians that may be left out, see `paraboloid.statistics`;
             what was is the result's `left_out`.

    See `paraboloid.operators` for the other arguments; a loader counts as one big batch.

    Raises ValueError where batch norm in training mode mixes the samples.
    """
    quantity = DiagGGN(samples, tol)
    passes = OverData(model, loss_fn, data, output=output, seed=seed, max_memory=max_memory)
    sums = passes.sums([quantity])
    forms = [diagonal_form(passes.factor * value.flatten()) for value in sums.values[quantity.name].values()]
    D = Diagonalised(passes.values, forms)
    D.left_out = relative(sums.left_out.get(quantity.name))
    return D
