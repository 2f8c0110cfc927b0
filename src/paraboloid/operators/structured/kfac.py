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
from typing import Any

from torch import Tensor, nn

from paraboloid.data.batches import Output
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Decomposed, Kron
from paraboloid.operators.matrix_free.pulls import Pulls
from paraboloid.operators.partition import block_names
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.passes.memory import INPUTS
from paraboloid.quantities.named import check_sharing, fisher_source
from paraboloid.reductions.eigenbasis import Turned, eigen_scale
from paraboloid.reductions.kronecker_factors import Factors, add_factors, merged, scale_factors
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.recent import Recent


def KFAC(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    output: Output | None = None,
    max_memory: int | None = None,
    measure_on: Any = None,
) -> KroneckerFactored | Diagonalised:
    """Kronecker-factored approximate curvature of the loss as reduced, as a linear operator: one pass over the data.

    fisher      "mc" (labels sampled from the model, `samples` of them for each input: unbiased factors whose trace does
                not depend on `samples`), "exact" (KFLR) or "empirical" (the given labels)
    sharing     "expand" or "reduce", for weights used at several positions
    measure_on  other data: the eigenvectors are those of `data`, the eigenvalues those of the factors of the other data
                along them, diag(U^T left U) (x) diag(W^T right W)

    See `paraboloid.operators` for the other arguments; a loader counts as one big batch.  Batch norm in training mode
    is accepted, see `pb.quantities.KFAC`.  Factors are decomposed when something first needs that.

    Raises NotImplementedError for parameters without Kronecker structure, with what to do.
    Sources: Martens & Grosse 2015, arXiv:1503.05671; Eschenhagen et al. 2023, arXiv:2311.00636 (expand, reduce).
    """
    options = {"fisher": fisher, "samples": samples, "seed": seed, "output": output, "max_memory": max_memory}
    pulls = _pulls(model, loss_fn, data, **options)
    factors, _ = fitted(pulls, sharing, thin=measure_on is None)
    K = KroneckerFactored(pulls.parameters, factors)
    if measure_on is None:
        return K
    other, _ = fitted(_pulls(model, loss_fn, measure_on, **options), sharing, thin=True)
    pairs = zip(K.eigenform.forms, other.values(), strict=True)
    return Diagonalised(K.parameters, [kron.along(form) for form, kron in pairs])


def KFLR(model: nn.Module, loss_fn: Any, data: Any, **options: Any) -> KroneckerFactored | Diagonalised:
    """`KFAC` with the exact output-Hessian instead of sampled labels; its other options are the same.

    Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
    """
    if "fisher" in options:
        raise ValueError(f"fisher is {options['fisher']!r}; KFLR is KFAC with fisher='exact', so leave it out.")
    return KFAC(model, loss_fn, data, fisher="exact", **options)


def EKFAC(
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    sharing: str = "expand",
    output: Output | None = None,
    max_memory: int | None = None,
    measure_on: Any = None,
) -> Diagonalised:
    """Curvature with the eigenvectors of KFAC and the exact eigenvalues along them: each block's trace is the GGN's.

    The eigenvalue of u (x) w is a sum_{v,n} (u . (J_n^T v) w)^2, positions and uses summed before squaring: of all
    matrices with these eigenvectors it is the nearest to the GGN's block (or to the Monte Carlo or empirical Fisher's).

    A single batch takes one forward pass, a loader two passes over the data.  With `measure_on` the eigenvectors are
    those of `data` and the eigenvalues those of the other data.  The other arguments are those of `KFAC`.

    Source: George et al. 2018, arXiv:1806.03884.
    """
    options = {"fisher": fisher, "samples": samples, "seed": seed, "output": output, "max_memory": max_memory}
    same = measure_on is None
    pulls = _pulls(model, loss_fn, data, **options, repeated=same)
    # summed or averaged over positions, the rows do not span what the exact eigenvalues see: no thin bases then
    factors, exact = fitted(pulls, sharing, thin=same and sharing == "expand")
    names = block_names(pulls.parameters, [[i] for i in range(len(pulls.parameters))])
    known: list[Decomposed] = []
    forms = {k: product.eigenform(n, known) for (k, product), n in zip(factors.items(), names, strict=True)}
    other = pulls if same else _pulls(model, loss_fn, measure_on, **options)
    scales = measured_scales(other, {k: form for k, form in forms.items() if not (same and k in exact)})
    return Diagonalised(
        pulls.parameters, [replace(form, values=scales[k]) if k in scales else form for k, form in forms.items()]
    )


def _pulls(model, loss_fn, data, *, fisher, samples, seed, output, max_memory, repeated=False) -> Pulls:
    source = fisher_source(fisher, samples)
    return Pulls(
        model, loss_fn, data, source, output=output, seed=seed, max_memory=max_memory, repeated=repeated
    )  # fmt: skip


def fitted(pulls: Pulls, sharing: str, thin: bool) -> tuple[dict[str, Kron], set[str]]:
    """The factors of every parameter from one pass, summed over all data before the product; whose block is exact."""
    sums = summed_factors(pulls, sharing, thin)
    exact = {name for name, value in sums.items() if value.exact is not None}
    return {name: scale_factors(value, pulls.factor) for name, value in sums.items()}, exact


def summed_factors(pulls: Pulls, sharing: str, thin: bool) -> dict[str, Factors]:
    """The sums of every parameter's factors from one pass; `thin`: factors of few rows are kept by their rows."""
    check_sharing(sharing)
    recent = Recent()

    def add(name: str, value: Factors | None, o: Outer) -> Factors:
        return add_factors(value, o, sharing, pulls.max_memory, thin, recent)

    return pulls.summed(add, merged)


def measured_scales(pulls: Pulls, forms: Mapping[str, Eigenform]) -> dict[str, Tensor]:
    """The exact eigenvalues along the eigenvectors of `forms`, from one pass."""

    turned = Turned(INPUTS.of(pulls.max_memory))

    def add(name, value, o):
        if name not in forms:
            return None
        if value is None:  # a new batch
            turned.start(name)
        bases, several = (forms[name].left, forms[name].right), pulls.vectors > len(o.left)
        scale = eigen_scale(o, *bases, pulls.max_memory, pulls.vectors, turned if several else None, name)
        return scale if value is None else value.add_(scale)

    sums = pulls.summed(add, lambda total, value: value if total is None else total.add_(value))
    return {name: (pulls.factor * value).to(forms[name].values) for name, value in sums.items() if value is not None}
