"""The table of quantities: which vectors to pull back, and how to reduce them.

| pull back \\ reduce    | samples      | sum of squares      | squared norms, Gram | Kronecker factors |
|-----------------------|--------------|---------------------|---------------------|-------------------|
| the loss gradient     | SampleGrads  | SecondMoment, Variance | SquareNorms, Gram | KFAC("empirical") |
| exact root of Hessian | SqrtGGN      | DiagGGN             |                     | KFAC("exact")     |
| sampled labels        |              | DiagGGN(samples=1)  |                     | KFAC("mc")        |
| any, in an eigenbasis |              | EigenScale          |                     |                   |
| second derivatives    | SampleDiagHessian | DiagHessian    |                     |                   |
| recursion over layers |              |                     |                     | KFRA              |

g_n is the gradient of the *unreduced* loss of sample n, a = 1 / normalizer the reduction's factor (1/N for a mean),
and J_n^T S_n the pulled-back root of the output-Hessian: the GGN of the loss as reduced is a sum_{v,n} of its squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from paraboloid.quantities.curvature import DiagGGN, DiagHessian, SampleDiagGGN, SampleDiagHessian, SqrtGGN
from paraboloid.quantities.gradients import Grad, Gram, SampleGrads, SecondMoment, SquareNorms, Variance
from paraboloid.quantities.kronecker import KFAC, KFRA
from paraboloid.quantities.quantity import Quantity, check_tolerance
from paraboloid.reductions.sums import PARTS

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
    "sample_diag_hessian": SampleDiagHessian,
    "sqrt_ggn": SqrtGGN,
    "kfac": KFAC,
    "kflr": lambda **options: KFAC("exact", **options),
    "kfac_empirical": lambda: KFAC("empirical"),
    "kfra": KFRA,
}

EXACT = {"diag_ggn", "sample_diag_ggn", "sqrt_ggn", "kflr"}  # those of the root, which take a tolerance


def resolve(entries: Any, tol: float = 0.0) -> list[Quantity]:
    """Names and `Quantity` objects -> objects, without repeats; those named of the loss's root with the tolerance.

    Raises ValueError for unknown or clashing ones, and for a tolerance that no name takes."""
    entries = [entries] if isinstance(entries, str | Quantity) else list(entries)
    found: dict[str, Quantity] = {}
    for entry in entries:
        if isinstance(entry, str) and entry not in QUANTITIES:
            raise ValueError(f"unknown quantity {entry!r}; expected one of {sorted(QUANTITIES)} or an object of "
                             "pb.quantities.")  # fmt: skip
        if not isinstance(entry, str | Quantity):
            raise ValueError(f"a quantity is {entry!r}; expected a name or an object such as pb.quantities.DiagGGN().")
        quantity = _named(entry, tol if entry in EXACT else 0.0) if isinstance(entry, str) else entry
        if quantity.name in found and entry != quantity.name:
            raise ValueError(f"{quantity.name!r} is asked for twice; ask for it once.")
        if unknown := set(quantity.needs) - PARTS:
            raise ValueError(f"{quantity.name!r} needs {sorted(unknown)}; the parts that a quantity may need are "
                             f"{sorted(PARTS)}.")  # fmt: skip
        found[quantity.name] = quantity
    if check_tolerance(tol) and not any(entry in EXACT for entry in entries if isinstance(entry, str)):
        raise ValueError(f"tol is {tol}, but none of {list(found)} takes it; expected one of {sorted(EXACT)} by its "
                         "name. An object has its own, as pb.quantities.DiagGGN(tol=1e-2).")  # fmt: skip
    if not found:
        raise ValueError(f"no quantity is asked for; expected some of {sorted(QUANTITIES)}.")
    return list(found.values())


@cache
def _named(name: str, tol: float) -> Quantity:
    """Made once: what a quantity notes of a batch is in the copy that `bound` gives."""
    return QUANTITIES[name](tol=tol) if tol else QUANTITIES[name]()


def check_samples(quantities: Sequence[Quantity], N: int) -> None:
    """Raise ValueError for a batch too small for a quantity; it says which to leave out."""
    large = [q for q in quantities if q.least_samples > N]
    if large:
        rest = [q.name for q in quantities if q not in large]
        out = " and ".join(repr(q.name) for q in large)
        instead = f" Leave out {out}; {rest} are defined for such a batch." if rest else ""
        raise ValueError(
            f"{large[0].name!r} needs a batch of at least {large[0].least_samples} samples; found {N}.{instead}"
        )
