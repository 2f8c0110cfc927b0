"""Directions and curvatures from one budget of samples without the bias: folds that choose, and folds that measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output, as_batch
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.operators.matrix_free.jacobian_form import JacobianForm
from paraboloid.quadratics.local_model import CURVATURES, DIRECTIONS, Quadratic, chosen, quadratic


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Directions that each fold of a batch chose, with slopes and curvatures on the samples that did not choose them.

    directions      [folds, k, D]
    slope           [folds, k] on the other samples; `same_slope` on the choosing ones
    curvature       [folds, k] on the other samples; `same_curvature` on the choosing ones
    standard_error  [folds, k] of `curvature`, from the curvatures of single samples; None for the Hessian
    """

    directions: Tensor
    slope: Tensor
    curvature: Tensor
    same_slope: Tensor
    same_curvature: Tensor
    standard_error: Tensor | None

    def interval(self, deviations: float = 1.96) -> tuple[Tensor, Tensor]:
        """Lower and upper ends of the confidence intervals of `curvature`, [folds, k] each; 95 % for 1.96."""
        if self.standard_error is None:
            raise ValueError("the curvature is the Hessian's, which is not known sample by sample; expected a "
                             "cross-fit with curvature='ggn' or 'fisher'.")  # fmt: skip
        return self.curvature - deviations * self.standard_error, self.curvature + deviations * self.standard_error

    def step(self, damping: float = 0.0) -> Tensor:
        """The mean over folds of sum_i -slope_i / (curvature_i + damping) d_i: a flat [D]."""
        curvature = self.curvature + damping
        if not (curvature != 0).all():
            fold, i = (curvature == 0).nonzero()[0].tolist()
            raise ValueError(f"the curvature + damping is 0 along direction {i} of fold {fold}; expected a number "
                             f"other than 0 to divide the slope by. Give a damping above {damping}.")  # fmt: skip
        return torch.einsum("fk,fkd->d", -self.slope / curvature, self.directions) / len(self.directions)


def cross_fit(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Data,
    k: int = 10,
    folds: int = 2,
    directions: str = "eigen",
    curvature: str = "ggn",
    weight_decay: float = 0.0,
    seed: int = 0,
    *,
    chosen_by: str = "fold",
    damping: float = 0.0,
    output: Output | None = None,
) -> CrossFit:
    """Use every sample of a batch both to choose directions and to measure along directions that others chose.

    The samples are dealt out to `folds` parts at random, by `seed`.  With two folds the halves swap roles.

    directions  "eigen", "cg" (with `damping`), "kfac" or "ekfac", as in `pb.bias`
    chosen_by   how the samples are split: directions come from one "fold" and are measured on all others, or come from
                all others, the "rest", and are measured on the fold

    Along each direction slope and curvature are unbiased for all data without the choosing samples; the standard error
    is s / sqrt(n), with s the deviation of u.C_i u over the n measuring samples.

    Raises ValueError for a batch that cannot be dealt out.  Source: arXiv:2410.14325 (two batches); folds are ours.
    """
    pair = as_batch(batch)
    if pair is None or not isinstance(pair[0], Tensor):
        raise ValueError(f"the batch is a {type(batch).__name__}; expected one batch of two tensors (inputs, targets), "
                         "whose samples can be dealt out.")  # fmt: skip
    x, y = pair
    check_count("folds", folds, most=len(y))
    if folds < 2:
        raise ValueError(f"folds is {folds}; expected at least 2, for one part cannot measure what it chose.")
    for name, value, allowed in (
        ("directions", directions, DIRECTIONS), ("curvature", curvature, tuple(CURVATURES)),
        ("chosen_by", chosen_by, ("fold", "rest")),
    ):  # fmt: skip
        check_choice(name, value, list(allowed))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed), device="cpu").to(y.device)
    parts = list(order.tensor_split(folds))

    def fit(indices: Tensor) -> Quadratic:
        data = (x[indices.to(x.device)], y[indices])
        return quadratic(model, loss_fn, data, curvature, weight_decay, output=output, seed=seed)

    found: list[tuple[Tensor, ...]] = []
    errors: list[Tensor] = []
    for i in range(folds):
        one, rest = parts[i], torch.cat(parts[:i] + parts[i + 1 :])
        chooser, measurer = (fit(one), fit(rest)) if chosen_by == "fold" else (fit(rest), fit(one))
        rows = chosen(chooser, directions, k, damping, seed)
        found.append((rows, *measurer.along(rows), *chooser.along(rows)))
        if curvature != "hessian":
            errors.append(curvature_error(measurer, rows))
    rows, slope, curvatures, same_slope, same_curvature = (torch.stack(t) for t in zip(*found, strict=True))
    return CrossFit(
        rows, slope, curvatures, same_slope, same_curvature, torch.stack(errors) if errors else None
    )  # fmt: skip


def curvature_error(q: Quadratic, rows: Tensor) -> Tensor:
    """Standard error of d.C d for each row, from the spread over single samples: [k]."""
    forms = bare(q).sample_quadratic_forms(rows)
    return forms.std(1) / forms.shape[1] ** 0.5


def bare(q: Quadratic) -> JacobianForm:
    """The curvature of a quadratic without the weight decay, which is the same for every sample."""
    terms = getattr(q.curvature, "terms", [q.curvature])
    found = next((term for term in terms if isinstance(term, JacobianForm)), None)
    if found is None:
        raise ValueError(f"the curvature is a {type(q.curvature).__name__}; expected a GGN or a Fisher, which are "
                         "known sample by sample.")  # fmt: skip
    return found
