"""A layer rule against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from paraboloid.layers import LOWERINGS, RULES
from paraboloid.testing.cases import Case, named, read
from paraboloid.testing.layer_model import Comparison
from paraboloid.testing.layer_uses import check_lowering, check_uses


def check_rule(op: Callable, cases: Iterable[Any]) -> None:
    """Check the rule (or the lowering) of an operation in everything that is made of it, against loops of autograd.

        pb.testing.check_rule(torch.addcmul, [(torch.randn(4, 3), nn.Parameter(torch.randn(3)), torch.randn(4, 3))])

    op     the operation, as the rule is registered for it
    cases  arguments of a call each: a tuple, a pair (tuple, dict of keywords), or a function that makes one of these;
           one with a parameter is given the number of samples, 3, 1 and 2.  Tensors that require grad are the weights;
           one that is expanded stands for the parameter that it is expanded from.  Draw the numbers at random: zeros
           and ones hide mistakes.  Small sizes suffice

    Everything runs in float64.  First the rule alone: for every row of the output, left times right must be autograd's
    gradient of that row, and what the rule says of its own form must hold (shapes, rows of `right` by slices, `arrange`
    without arithmetic, affine or not).  Then, for every axis that the rule says may hold the samples, with the given
    number of samples, with one, and with as many as there are positions, samples joined to positions in one axis, and
    tensors that are not contiguous: grad, sample_grads, square_norms, gram, second_moment, variance, diag_ggn,
    sample_diag_ggn and diag_hessian of the call's weights and of a layer below; and where there are Kronecker factors
    kflr (expand and reduce), the EKFAC scale, kfra and what K-BFGS reads.

    Raises AssertionError, which says which quantity of which argument is off, at which entry, and by how much.
    """
    if op not in RULES and op not in LOWERINGS:
        raise AssertionError(f"{named(op)} has no rule; expected one, registered with "
                             "@paraboloid.layers.rule(operation) for the function that the model calls.")  # fmt: skip
    checked = 0
    for case in read(op, cases):
        for form in (case, case.strided()):
            axes = check_uses(form) if op in RULES else check_lowering(form)
            for comparison in _comparisons(form, axes, op in RULES, every=form is case):
                comparison.check()
            checked += 1
    if not checked:
        raise ValueError("cases is empty; expected at least one call.")


def _comparisons(case: Case, axes: list[int], uses: bool, every: bool) -> Iterator[Comparison]:
    """The network around the call in all its layouts; `every`: in other numbers of samples too."""
    for axis in axes:
        along = case.axes_along(axis)
        below = {i: a for i, a in (along or {}).items() if case.tensors[i].is_floating_point()}
        for sized in (case, *case.sizes(axis, along)) if every else (case,):
            d = sized.output().shape[axis]
            yield Comparison(sized, axis, (1, d, 1), below, uses)
            if every and sized is case and (N := _divisor(d)) > 1:
                yield Comparison(sized, axis, (1, N, d // N), below, uses)
                yield Comparison(sized, axis, (d // N, N, 1), below, uses)


def _divisor(d: int) -> int:
    """A number of samples that an axis of length d holds among positions; 1 where there is none."""
    return next((n for n in range(2, d) if d % n == 0), 1)
