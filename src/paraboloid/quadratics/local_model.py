"""The local quadratic model of a loss: q(d) = c + g.d + d.C d / 2, and directions and steps in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.krylov import orthogonalise, random_unit
from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.losses import LossFunction
from paraboloid.operators import EKFAC, GGN, KFAC, Diagonalised, Fisher, Hessian, Identity, LinearOperator
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.operators.partition import Blocks
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.operators.vectors import join
from paraboloid.passes import trees

CURVATURES: dict[str, type[GGN | Hessian | Fisher]] = {"ggn": GGN, "hessian": Hessian, "fisher": Fisher}
DIRECTIONS = ("eigen", "cg", "kfac", "ekfac")
KRONECKER: dict[str, Callable[..., KroneckerFactored | Diagonalised]] = {"kfac": KFAC, "ekfac": EKFAC}


@dataclass(frozen=True, eq=False)
class Quadratic:
    """q(d) = value + gradient.d + d.C d / 2 around the current parameters; everything includes weight decay.

    value      the loss as reduced + weight_decay / 2 ||theta||^2, a 0-dimensional tensor
    gradient   by parameter name
    curvature  C, a linear operator [D, D]
    kronecker  makes the batch's KFAC, or with True its EKFAC, for `kron_directions`; None where there is none
    """

    value: Tensor
    gradient: dict[str, Tensor]
    curvature: LinearOperator
    kronecker: Callable[[bool], KroneckerFactored | Diagonalised] | None = field(default=None, repr=False)

    def __call__(self, step: Tensor | Mapping[str, Tensor]) -> Tensor:
        """q(step), for a flat [D] or a dict: 0-dimensional."""
        d = self.curvature.columns(step)
        if d.dim() != 1:
            raise ValueError(f"the step has shape {tuple(d.shape)}; expected [{len(d)}], or a dict by parameter name.")
        return self.value + d @ self._flat_gradient + self.curvature.quadratic_forms(d.unsqueeze(0)).squeeze(0) / 2

    @property
    def _flat_gradient(self) -> Tensor:
        return trees.flatten(self.gradient, self.curvature.parameters).to(self.curvature.dtype)

    def along(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """(slopes d.g / |d| [k], curvatures d.C d / |d|^2 [k]) along the rows d of `directions` [k, D].

        The first and second derivative of q per unit step, whatever the directions' lengths.  For the GGN a curvature
        needs J d alone, about one gradient's cost.  Raises ValueError for a direction of length 0, NaN or infinity.
        """
        rows = self.curvature.rows(directions)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        least, most = (t.item() for t in lengths.aminmax()) if len(lengths) else (1.0, 1.0)
        if not (least > 0 and isfinite(most)):
            wrong = int((~(lengths.isfinite() & (lengths > 0))).nonzero()[0])
            raise ValueError(f"direction {wrong} has the length {lengths[wrong]:.4g}; expected one above 0, which says "
                             "where to.")  # fmt: skip
        if not max(1 - least, most - 1) < 100 * torch.finfo(rows.dtype).eps:  # unit vectors are taken as they are
            rows = rows / lengths.unsqueeze(1)
        return rows @ self._flat_gradient, self.curvature.quadratic_forms(rows)

    def eigen_directions(self, k: int, tol: float | None = None, seed: Seed = 0) -> Tensor:
        """The top k eigenvectors of C, algebraically largest first: orthonormal rows [k, D]."""
        return self.curvature.eigsh(k, tol=tol, seed=seed)[1].T.contiguous()

    def kron_directions(self, k: int, corrected: bool = False) -> Tensor:
        """The top k eigenvectors u_l (x) u_r of the batch's Kronecker factors: orthonormal rows [k, D].

        Each lies within one parameter.  They are ordered by eigenvalue, largest first: that of KFAC or, `corrected`,
        that of EKFAC, which is the mean square along the vector.  The factors are exact (`pb.KFLR`), but those of a
        "fisher", "kfac" or "ekfac" come from labels drawn by its seed.

        Raises ValueError for a quadratic whose curvature was given as an operator without Kronecker factors.
        """
        if self.kronecker is None:
            raise ValueError(f"the curvature is a {type(self.curvature).__name__} given as an operator, which has no "
                             "Kronecker factors; expected a quadratic made with curvature='ggn', 'hessian', 'fisher', "
                             "'kfac' or 'ekfac', or with a pb.KFAC.")  # fmt: skip
        return self.kronecker(corrected).eigsh(k)[1].T.contiguous()

    def conjugate_directions(self, k: int, damping: float = 0.0, seed: Seed = 0) -> Tensor:
        """The first k search directions of conjugate gradients on (C + damping I) p = -g from 0, normalised: [k, D].

        Residuals are orthogonalised twice against all earlier ones, so the directions stay conjugate in floating point:
        `step_along` of them is the k-th CG iterate.  Where the residual vanishes earlier (C + damping I has fewer
        distinct eigenvalues than k), the method goes on from random residuals orthogonal to the earlier ones, so that
        k = D directions always span the space; along those this q has slope 0.
        """
        size = self.curvature.shape[0]
        check_count("k", k, most=size)
        eps, generator = torch.finfo(self.curvature.dtype).eps, generator_of(seed, self.curvature.device)
        residuals = self._flat_gradient.new_zeros(k, size)  # of unit length
        directions = torch.zeros_like(residuals)
        r = -self._flat_gradient
        p, scale, largest = torch.zeros_like(r), r.norm(), 0.0
        previous = r.norm()
        for i in range(k):
            length = r.norm()
            if not length > 10 * eps * scale:  # nothing but rounding error is left: start again elsewhere
                r, p = random_unit(residuals[:i], generator), torch.zeros_like(r)
                length = previous = r.norm()
            residuals[i] = r / length
            p = r + (length / previous) ** 2 * p
            directions[i] = p / p.norm()
            Cp = (self.curvature @ p).add_(p, alpha=damping)
            curvature, previous = p @ Cp, length
            largest = max(largest, (curvature / p.square().sum()).abs().item())
            if curvature.abs() > 10 * eps * largest * p.square().sum():
                alpha = length**2 / curvature
                scale = length + alpha.abs() * Cp.norm()
                r, _ = orthogonalise(r - alpha * Cp, residuals[: i + 1])
            else:  # flat: no step, and nowhere to go from here
                r = torch.zeros_like(r)
        return directions

    def step_along(self, directions: Tensor, damping: float = 0.0) -> Tensor:
        """sum_i -slope_i / (curvature_i + damping) d_i / |d_i|, with slopes and curvatures of this q: a flat [D].

        With directions from another batch it is the debiased step; with this q's own conjugate directions, and the
        damping they were made with, the CG iterate.  Source: arXiv:2410.14325.
        """
        rows = self.curvature.rows(directions)
        slopes, curvatures = self.along(rows)
        curvatures = curvatures + damping
        if not (curvatures != 0).all():
            flat = (curvatures == 0).nonzero()[0].item()
            raise ValueError(f"the curvature + damping is 0 along direction {flat}; expected a number other than 0 to "
                             f"divide the slope by. Give a damping above {damping}.")  # fmt: skip
        return (-slopes / curvatures / torch.linalg.vector_norm(rows, dim=1)) @ rows


def chosen(q: Quadratic, directions: str, k: int, damping: float, seed: int, tol: float | None = None) -> Tensor:
    """k directions of a quadratic by their name, rows [k, D]; eigenvectors to a relative residual `tol`."""
    if directions == "eigen":
        return q.eigen_directions(k, tol=tol, seed=seed)
    if directions == "cg":
        return q.conjugate_directions(k, damping, seed=seed)
    return q.kron_directions(k, corrected=directions == "ekfac")


def quadratic(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Data,
    curvature: str | LinearOperator = "ggn",
    weight_decay: float = 0.0,
    *,
    blocks: Blocks = "all",
    output: Output | None = None,
    seed: int = 0,
    max_memory: int | None = None,
) -> Quadratic:
    """The quadratic model of the loss on a batch (or on an iterable of batches, which counts as one).

    curvature     "ggn", "hessian", "fisher" (one label drawn for each sample, by `seed`), "kfac", "ekfac" (likewise),
                  or an operator of `paraboloid.operators`, taken as the curvature of the loss
    weight_decay  beta of beta / 2 ||theta||^2, over every trainable parameter
    blocks        of a "ggn", "hessian" or "fisher": "all", or only the diagonal blocks of each "parameter", each
                  "layer" or lists of names

    The other arguments are those of the operators.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; expected a number of at least 0.")
    options = {"output": output, "seed": seed, "max_memory": max_memory}
    fisher = "exact" if curvature in ("ggn", "hessian") else "mc"
    kronecker = lambda corrected: (EKFAC if corrected else KFAC)(model, loss_fn, batch, fisher=fisher, **options)  # noqa: E731
    if isinstance(curvature, LinearOperator) or curvature in KRONECKER:
        if isinstance(curvature, LinearOperator):
            operator = curvature
            structured = operator if isinstance(operator, KroneckerFactored | Diagonalised) else None
            kronecker = None if structured is None else lambda corrected: structured
        else:
            operator = KRONECKER[curvature](model, loss_fn, batch, **options)
        replay = Replay(model, loss_fn, batch, OutputGraph, **{**options, "max_memory": 0})
        expected = {k: tuple(p.shape) for k, p in replay.parameters.items()}
        found = {k: tuple(p.shape) for k, p in operator.parameters.items()}
        if list(found.items()) != list(expected.items()):
            raise ValueError(f"the curvature has the parameters {found}; expected those of the model, {expected}.")
    elif curvature in CURVATURES:
        operator = fitted = CURVATURES[curvature](model, loss_fn, batch, blocks=blocks, **options)
        replay = fitted.replay
    else:
        raise ValueError(f"curvature is {curvature!r}; expected one of {[*CURVATURES, *KRONECKER]} or a linear "
                         "operator.")  # fmt: skip
    values = list(replay.parameters.values())
    with torch.no_grad():
        value = torch.tensor(replay.value, dtype=operator.dtype, device=operator.device)
        value += weight_decay / 2 * join(values).square().sum()
        gradient = {
            name: g + weight_decay * p if weight_decay else g
            for (name, p), g in zip(replay.parameters.items(), replay.gradient(), strict=True)
        }
    decayed = operator + weight_decay * Identity(operator.parameters) if weight_decay else operator
    return Quadratic(value, gradient, decayed, kronecker)
