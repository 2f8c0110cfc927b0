"""Kronecker-factored curvature of a model on its data: KFAC, KFLR and EKFAC.

Every parameter has a block of its own, left (x) right in its row-major order; with l the pulled-back vectors and r the
layer inputs, a the reduction's factor, N samples and T positions:

    weight, "expand"    left = a sum_{v,n,t} l l^T               right = 1/(N T) sum_{n,t} r r^T
    weight, "reduce"    left = a sum_{v,n} (sum_t l)(sum_t l)^T  right = 1/N sum_n (mean_t r)(mean_t r)^T
    bias, scale, raw    the exact block a sum_{v,n} (sum_t l)(sum_t l)^T; beyond 4096 elements its diagonal
    embedding           [vocabulary, dim]: the left factor is a diagonal
    transposed convolution   [in, out, k]: the input's factor is on the left

Weight and bias are separate blocks, and several uses of one parameter count as further positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Decomposed, Kron
from paraboloid.losses import LossFunction
from paraboloid.operators.partition import block_names
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.quantities import kronecker
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.result import relative
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, Factors, scale_factors


def KFAC(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    max_factor: int = MAX_FACTOR,
    output: Output | None = None,
    max_memory: int | None = None,
    measure_on: Data | None = None,
    tol: float = 0.0,
) -> KroneckerFactored | Diagonalised:
    """Kronecker-factored approximate curvature of the loss as reduced, as a linear operator: one pass over the data.

    fisher      "mc" (labels sampled from the model, `samples` of them for each input: unbiased factors whose trace does
                not depend on `samples`), "exact" (KFLR) or "empirical" (the given labels)
    sharing     "expand" or "reduce", for weights used at several positions
    max_factor  a side with more rows (over a large vocabulary) is its diagonal; a warning says which
    measure_on  other data: the eigenvectors are those of `data`, the eigenvalues those of the factors of the other data
                (within what a factor of `data` does not see, whose eigenvectors are arbitrary, their mean)
                along them, diag(U^T left U) (x) diag(W^T right W)
    tol         with fisher="exact": relative trace of the loss's Hessians that may be left out, see
                `paraboloid.statistics`; what was (of what the eigenvalues were measured on) is the result's `left_out`

    See `paraboloid.operators` for the other arguments; a loader counts as one big batch.  Batch norm in training mode
    is accepted, see `pb.quantities.KFAC`.  Factors are decomposed when something first needs that.

    A parameter without Kronecker structure (weight_norm's, one used by an operation without a rule) has the diagonal of
    its block, exact entry by entry; a warning names it.

    Sources: Martens & Grosse 2015, arXiv:1503.05671; Eschenhagen et al. 2023, arXiv:2311.00636 (expand, reduce).
    """
    options = {"seed": seed, "output": output, "max_memory": max_memory}
    quantity = factors_of(fisher, samples, sharing, measure_on is None, tol, max_factor)
    passes = OverData(model, loss_fn, data, **options)
    own = fitted(passes, quantity)
    K = KroneckerFactored(passes.values, own.blocks)
    K.left_out = own.left_out
    if measure_on is None:
        return K
    quantity = factors_of(fisher, samples, sharing, True, tol, max_factor)
    other = fitted(OverData(model, loss_fn, measure_on, **options), quantity)
    pairs = zip(K.eigenform.forms, other.blocks.values(), strict=True)
    measured = Diagonalised(K.parameters, [kron.along(form) for form, kron in pairs])
    measured.left_out = other.left_out
    return measured


def KFLR(model: nn.Module, loss_fn: LossFunction, data: Data, **options: Any) -> KroneckerFactored | Diagonalised:
    """`KFAC` with the exact output-Hessian instead of sampled labels; its other options are the same.

    Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
    """
    if "fisher" in options:
        raise ValueError(f"fisher is {options['fisher']!r}; KFLR is KFAC with fisher='exact', so leave it out.")
    return KFAC(model, loss_fn, data, fisher="exact", **options)


def EKFAC(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    max_factor: int = MAX_FACTOR,
    output: Output | None = None,
    max_memory: int | None = None,
    measure_on: Data | None = None,
    tol: float = 0.0,
) -> Diagonalised:
    """Curvature with the eigenvectors of KFAC and the exact eigenvalues along them: each block's trace is the GGN's.

    The eigenvalue of u (x) w is a sum_{v,n} (u . (J_n^T v) w)^2, positions and uses summed before squaring: of all
    matrices with these eigenvectors it is the nearest to the GGN's block (or to the Monte Carlo or empirical Fisher's).

    A single batch takes one forward pass, a loader two passes over the data.  With `measure_on` the eigenvectors are
    those of `data` and the eigenvalues those of the other data.  The other arguments are those of `KFAC`.

    Source: George et al. 2018, arXiv:1806.03884.
    """
    options = {"seed": seed, "output": output, "max_memory": max_memory}
    same = measure_on is None
    # summed or averaged over positions, the rows do not span what the exact eigenvalues see: no thin bases then
    quantity = factors_of(fisher, samples, sharing, same and sharing == "expand", tol, max_factor)
    passes = OverData(model, loss_fn, data, **options, again=same)
    factors, exact, left_out = fitted(passes, quantity)
    names = block_names(passes.parameters, [[i] for i in range(len(passes.parameters))])
    known: list[Decomposed] = []
    forms = {k: product.eigenform(n, known) for (k, product), n in zip(factors.items(), names, strict=True)}
    other = passes if same else OverData(model, loss_fn, measure_on, **options)
    forms_left = {k: form for k, form in forms.items() if not (same and k in exact)}
    scales, measured_out = measured_scales(other, forms_left, fisher, samples, tol=tol)
    if not same:
        scales = {k: forms[k].evened(values) for k, values in scales.items()}
    E = Diagonalised(
        passes.values, [replace(form, values=scales[k]) if k in scales else form for k, form in forms.items()]
    )
    E.left_out = left_out if same else measured_out
    return E


def factors_of(
    fisher: str, samples: int, sharing: str = "expand", thin: bool = True, tol: float = 0.0,
    max_factor: int = MAX_FACTOR,
) -> kronecker.KFAC:  # fmt: skip
    """The quantity whose running values are the sums of factors; `thin`: those of few rows are kept by these."""
    return kronecker.KFAC(fisher, samples, sharing, tol, max_factor, thin)


class Fitted(NamedTuple):
    """The factors of every parameter, whose block is exact, and the relative trace that was left out."""

    blocks: dict[str, Kron]
    exact: set[str]
    left_out: float


def fitted(passes: OverData, quantity: kronecker.KFAC) -> Fitted:
    """From one pass, summed over all data before the product."""
    found = passes.sums([quantity])
    sums: dict[str, Factors] = found.values[quantity.name]
    quantity.announce(sums)
    exact = {name for name, value in sums.items() if value.exact is not None}
    blocks = {name: scale_factors(value, passes.factor) for name, value in sums.items()}
    return Fitted(blocks, exact, relative(found.left_out.get(quantity.name)))


def measured_scales(
    passes: OverData, forms: Mapping[str, Eigenform], fisher: str, samples: int, separate: bool = False,
    tol: float = 0.0,
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """The exact eigenvalues along the eigenvectors of `forms`, from one pass; the relative trace that was left out."""
    quantity = kronecker.EigenScale(forms, fisher, samples, tol)
    quantity.some, quantity.per_sample = True, separate
    found = passes.sums([quantity])
    sums = found.values[quantity.name]
    scales = {name: (passes.factor * sums[name]).to(form.values) for name, form in forms.items()}
    return scales, relative(found.left_out.get(quantity.name))
