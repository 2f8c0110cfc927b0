"""The posterior that moves the weights only where no training output moves (Miani, Roy and Hauberg 2024, 2410.16901).

N(theta, P / alpha) with the orthogonal projection P onto the null space of J, the Jacobian of all training outputs.
alpha = rank J / |theta|^2 is where the evidence is stationary in the limit of a likelihood that allows no change of
them.  Predictions average the softmax of the linearised outputs over draws.  In float64, by a Cholesky factor of J J^T
in place of alternating projections: as many rows as there are outputs fit into memory here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.quality_peers import Fitted, Task

DRAWS, SEED, SMALLEST = 50, 0, 1e-8  # of the trace, what counts as zero


def null_space(task: Task) -> Fitted:
    model, (x, y) = copy.deepcopy(task.model).double(), task.train
    posterior: Any = pb.laplace(model, nn.CrossEntropyLoss(), (x.double(), y), "functional", curvature="jacobian")
    return Fitted(projected(posterior, posterior.curvature.A))


def projected(posterior: Any, J: Tensor) -> Any:
    """Predictions with weights drawn in the null space of J [R, D]."""
    gram = J @ J.T
    ridge = SMALLEST * gram.diagonal().sum()
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    generator = torch.Generator().manual_seed(SEED)
    z = torch.randn(DRAWS, J.shape[1], generator=generator, dtype=J.dtype)
    z = z - torch.cholesky_solve(J @ z.T, factor).T @ J
    theta = torch.cat([w.flatten() for w in posterior.weights.values()])
    rank = J.shape[1] - z.square().sum(1).mean()  # D - tr P, by the draws
    d = z * (theta.norm() / rank.sqrt())
    parts = d.split([w.numel() for w in posterior.weights.values()], 1)
    names = dict(zip(posterior.weights, parts, strict=True))
    buffers = dict(posterior.model.named_buffers())

    def predict(x: Tensor) -> Tensor:
        def f(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(posterior.model, {**buffers, **parameters}, (x.double(),))

        total = torch.zeros(len(x), 10, dtype=torch.float64)
        for i in range(DRAWS):
            step = {k: t[i].view_as(posterior.weights[k]) for k, t in names.items()}
            mean, moved = torch.func.jvp(f, (posterior.weights,), (step,))
            total += (mean + moved).softmax(1)
        return total / DRAWS

    return predict
